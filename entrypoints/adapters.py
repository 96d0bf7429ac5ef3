"""`loraplex adapters inspect`: what an adapter is, and whether a model can serve it."""

from __future__ import annotations

import argparse
import sys


def add_adapters_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(
        dest="action", required=True, metavar="ACTION", parser_class=argparse.ArgumentParser
    )
    text = "Say what an adapter holds, what it takes in the pool, or why it is refused."
    inspect = actions.add_parser("inspect", help=text, description=text)
    inspect.add_argument("path", help="Directory of the adapter.")
    inspect.add_argument("--model", help="Base model to check it against: a directory or hub id.")
    inspect.add_argument("--revision", help="Branch, tag or commit of a hub model.")
    inspect.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="Type in which the model would be served (default: %(default)s).",
    )


def run_adapters(arguments: argparse.Namespace) -> int:
    """Write the report to standard output: 0 if the adapter is in order, else 1.

    Raises ValueError for a model that is not there or not supported.
    """
    # Imported late: they bring torch.
    import torch

    from loraplex.engine.models.registry import lora_spec
    from loraplex.lora.inspect import inspect_adapter

    base = None
    if arguments.model is not None:
        base = lora_spec(arguments.model, arguments.revision, arguments.dtype)
    report = inspect_adapter(arguments.path, base, getattr(torch, arguments.dtype))
    sys.stdout.write(report.render() + "\n")
    return 0 if report.fits else 1
