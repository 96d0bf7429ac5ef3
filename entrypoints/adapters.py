"""`loraplex adapters inspect`: what an adapter is, and whether a model can serve it."""

from __future__ import annotations

import argparse
import sys

from loraplex.entrypoints.command_parser import CommandParser


def add_adapters_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(
        dest="action", required=True, metavar="ACTION", parser_class=CommandParser
    )
    text = "Say what an adapter holds, what it takes in the pool, or why it is refused."
    inspect = actions.add_parser("inspect", help=text, description=text)
    inspect.add_argument("paths", nargs="+", metavar="path", help="Directory of an adapter.")
    inspect.add_argument("--model", help="Base model to check it against: a directory or hub id.")
    inspect.add_argument("--revision", help="Branch, tag or commit of a hub model.")
    inspect.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="Type in which the model would be served (default: %(default)s).",
    )


def run_adapters(arguments: argparse.Namespace) -> int:
    """Write a report for each to standard output: 0 if all adapters are in order, else 1.

    Raises ValueError for a model that is not there or not supported.
    """
    # Imported late: they bring torch.
    import torch

    from loraplex.engine.models.registry import lora_spec
    from loraplex.lora.inspect import inspect_adapter

    base = None
    if arguments.model is not None:
        base = lora_spec(arguments.model, arguments.revision, arguments.dtype)
    dtype = getattr(torch, arguments.dtype)
    fit = True
    for index, path in enumerate(arguments.paths):
        report = inspect_adapter(path, base, dtype)
        sys.stdout.write("\n" * (index > 0) + report.render() + "\n")
        fit &= report.fits
    return 0 if fit else 1
