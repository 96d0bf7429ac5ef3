"""One server after another, with more and more adapters: start-up, throughput, memory and errors.

Each serves S-LoRA's traffic (all requests at once), uniform over its adapters and skewed, in
passes: in the first what is asked for comes from disk, in the later ones it is in host memory. The
adapters' ranks are mixed.

    python benchmarks/many_adapters.py --num-adapters 5 20 100 1000 2000
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import uvloop

from loraplex.benchmarks import workloads
from loraplex.benchmarks.completion_client import Call, send_all
from loraplex.benchmarks.offline import (
    add_adapter_arguments,
    add_model_arguments,
    scratch_directory,
)
from loraplex.benchmarks.plots import plot_offline
from loraplex.benchmarks.results import result_path, write_result
from loraplex.benchmarks.serve import OwnServer, own_server, summarize

TRAFFIC = {"uniform": 1.0, "skewed": 0.3}
"""Exponents of the popularity of adapters (see workloads.slora)."""
AT_ONCE = 1e6  # requests per second
TIMEOUT = 1800.0
# With prefix caching a second pass would have its prompts for nothing.
FLAGS = ("--no-access-log", "--no-enable-prefix-caching")
HEADING = (
    f"{'adapters':>8} {'traffic':>8} {'pass':>4} {'distinct':>8} {'requests/s':>10} "
    f"{'tokens/s':>8} {'errors':>6} {'memory MB':>9}"
)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options = make_parser(prog).parse_args(arguments[:split])
    server_flags = arguments[split + 1 :]
    name = "many_adapters"
    figures: dict[str, Any] = {
        "settings": {
            flag: getattr(options, flag)
            for flag in ("num_requests", "input_len", "output_len", "rank", "modules", "passes")
        },
        "server_flags": server_flags,
        "rows": [],
    }
    with tempfile.TemporaryDirectory(dir=scratch_directory()) as directory:
        options.adapter_directory = options.adapter_directory or Path(directory)
        print(HEADING, flush=True)
        for count in options.num_adapters:
            of_server = argparse.Namespace(**{**vars(options), "num_adapters": count})
            with own_server(of_server, [*FLAGS, *server_flags]) as server:
                for row in measure(server, count, options):
                    figures["rows"].append(row)
                    print_row(row)
                    path = write_result(name, figures, options.output)
    print(f"written to {path}")
    later = [row | {"pass": row["traffic"]} for row in figures["rows"] if row["pass"] > 1]
    picture = plot_offline(
        later, "adapters in host memory", result_path(name, options.output).with_suffix(".png")
    )
    if picture is not None:
        print(f"written to {picture}")
    return 0


def make_parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog,
        usage="%(prog)s [flags] [-- flags of `loraplex serve`]",
        description="Start-up, throughput and memory of servers by the number of their adapters.",
    )
    add_model_arguments(parser)
    add_adapter_arguments(parser)
    parser.set_defaults(rank=[8, 16, 32, 64], modules=["q_proj", "v_proj"])
    parser.add_argument(
        "--num-adapters", type=int, nargs="+", default=[5, 20, 100, 1000, 2000], metavar="N",
        help="of each server (default: 5 20 100 1000 2000)",
    )  # fmt: skip
    numbers = [
        ("--num-requests", 128, "requests of a pass"),
        ("--input-len", 32, "tokens of each prompt"),
        ("--output-len", 16, "tokens generated for each"),
        ("--passes", 2, "times that each traffic is sent"),
    ]
    for flag, default, text in numbers:
        parser.add_argument(
            flag, type=int, default=default, metavar="N", help=f"{text} (default: %(default)s)"
        )
    parser.add_argument(
        "--output", type=Path, help="JSON file to write; the picture goes beside it"
    )
    return parser


def measure(
    server: OwnServer, num_adapters: int, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """A row for each pass of each traffic."""
    started_bytes = memory_bytes(server.process_id)
    for traffic, alpha in TRAFFIC.items():
        calls = [
            Call(f"a{request.adapter}", request.prompt_token_ids, request.max_tokens)
            for request in workloads.slora(
                num_adapters,
                alpha=alpha,
                rate=AT_ONCE,
                duration=options.num_requests / AT_ONCE,
                input_range=(options.input_len, options.input_len + 1),
                output_range=(options.output_len, options.output_len + 1),
                vocab_size=server.vocab_size,
            )
        ]
        for number in range(1, options.passes + 1):
            records, seconds = uvloop.run(send_all(server.url, calls, TIMEOUT))
            yield {
                "num_adapters": num_adapters,
                "traffic": traffic,
                "pass": number,
                "num_distinct": len({call.model for call in calls}),
                "startup_seconds": round(server.startup_seconds, 2),
                "started_bytes": started_bytes,
                "memory_bytes": memory_bytes(server.process_id),
                **summarize(records, seconds),
            }
            time.sleep(0.5)  # What the requests left is cleared away.


def memory_bytes(process_id: int) -> int:
    """Of a process and its descendants, memory that they share counted once (Linux's Pss)."""
    pages = Path(f"/proc/{process_id}/smaps_rollup").read_text()
    (line,) = (line for line in pages.splitlines() if line.startswith("Pss:"))
    tasks = Path(f"/proc/{process_id}/task").glob("*/children")
    children = [int(child) for task in tasks for child in task.read_text().split()]
    return int(line.split()[1]) * 1024 + sum(map(memory_bytes, children))


def print_row(row: dict[str, Any]) -> None:
    print(
        f"{row['num_adapters']:>8} {row['traffic']:>8} {row['pass']:>4} {row['num_distinct']:>8} "
        f"{row['requests_per_second']:>10.2f} {row['output_tokens_per_second']:>8.0f} "
        f"{sum(row['errors'].values()):>6} {row['memory_bytes'] / 1e6:>9.0f}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
