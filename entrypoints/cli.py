"""The command line: `loraplex COMMAND ...`. What a command needs is imported when it is chosen."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import loraplex
from loraplex.entrypoints.command_parser import CommandParser


class Command(NamedTuple):
    """A command's help, and where its functions are: what adds the flags, and what runs it."""

    help: str
    module: str
    add_arguments: str
    run: str

    def load(self, name: str) -> Callable[..., Any]:
        return getattr(import_module(self.module), name)


COMMANDS = {
    "serve": Command(
        "Serve a model and its adapters over HTTP.",
        "loraplex.entrypoints.serve", "add_serve_arguments", "run_serve",
    ),
    "generate": Command(
        "Generate text without a server.",
        "loraplex.entrypoints.generate", "add_generate_arguments", "run_generate",
    ),
    "run-batch": Command(
        "Answer a file of OpenAI requests without a server.",
        "loraplex.entrypoints.run_batch", "add_run_batch_arguments", "run_run_batch",
    ),
    "adapters": Command(
        "Look at adapters.",
        "loraplex.entrypoints.adapters", "add_adapters_arguments", "run_adapters",
    ),
    "bench": Command(
        "Measure throughput, latency and kernels.",
        "loraplex.entrypoints.bench", "add_bench_arguments", "run_bench",
    ),
    "demo": Command(
        "Serve the embedded model with its demo adapters and talk to all of them.",
        "loraplex.entrypoints.demo", "add_demo_arguments", "run_demo",
    ),
}  # fmt: skip


class LazyParser(CommandParser):
    """The parser of one command, which gets its flags when it has something to parse."""

    command: Command

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        self.command.load(self.command.add_arguments)(self)
        return super().parse_known_args(*args, **kwargs)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line. Returns the exit status: 2 for the user's mistake, 1 for a failure."""
    try:
        arguments = _make_parser().parse_args(argv)
        command = COMMANDS[arguments.command]
        status = command.load(command.run)(arguments)
        sys.stdout.flush()
        return status
    except ValueError as error:
        sys.stderr.write(f"loraplex: {error}\n")
        return 2
    except BrokenPipeError:
        # Whoever read the output has enough of it; nor can Python's own flush at the end write.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, RuntimeError) as error:
        sys.stderr.write(f"loraplex: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130


def _make_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="loraplex",
        description="Serve one language model with thousands of LoRA adapters.",
        epilog="`loraplex COMMAND --help` lists a command's flags.",
    )
    parser.add_argument("--version", action="version", version=f"loraplex {loraplex.__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=LazyParser
    )
    for name, command in COMMANDS.items():
        command_parser = commands.add_parser(name, help=command.help, description=command.help)
        command_parser.command = command
    return parser


if __name__ == "__main__":
    sys.exit(main())
