"""Command line flags out of config dataclasses."""

from __future__ import annotations

import argparse
import re
import types
import typing
from collections.abc import Collection
from dataclasses import MISSING, Field, fields
from typing import Any, TypeVar

from loraplex.engine.config import EngineConfig
from loraplex.engine.vllm_options import VLLM_OPTIONS

T = TypeVar("T")

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)


def add_config_arguments(
    parser: argparse.ArgumentParser, config_type: type, title: str, leave_out: Collection[str] = ()
) -> None:
    """A group with a flag for each field; flags that are not given leave no trace."""
    group = parser.add_argument_group(title)
    types_of = typing.get_type_hints(config_type)
    for entry in fields(config_type):
        if entry.name not in leave_out:
            flag = f"--{entry.name.replace('_', '-')}"
            kind = _value_type(types_of[entry.name])
            options = _options(entry.name, kind) | {
                name: value for name, value in entry.metadata.items() if name == "metavar"
            }
            group.add_argument(flag, default=argparse.SUPPRESS, help=_help(entry), **options)


def add_engine_arguments(parser: argparse.ArgumentParser, leave_out: Collection[str] = ()) -> None:
    """EngineConfig's flags; and vLLM's for what happens anyway, of which --help does not speak."""
    add_config_arguments(parser, EngineConfig, "engine", leave_out)
    for name, option in VLLM_OPTIONS.items():
        flag = f"--{name.replace('_', '-')}"
        options = _options(name, option.type)
        parser.add_argument(flag, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **options)


def engine_config_from_arguments(arguments: argparse.Namespace) -> EngineConfig:
    """Raises ValueError for what is not allowed."""
    names = VLLM_OPTIONS.keys() | {entry.name for entry in fields(EngineConfig)}
    return EngineConfig.from_options(**{k: v for k, v in vars(arguments).items() if k in names})


def config_from_arguments(arguments: argparse.Namespace, config_type: type[T]) -> T:
    """The config with what was given. Raises ValueError for what it does not allow."""
    names = {entry.name for entry in fields(config_type)}  # type: ignore[arg-type]
    return config_type(**{k: v for k, v in vars(arguments).items() if k in names})


def parse_size(text: str) -> int:
    """Bytes: a number, which may end in K, M, G or T (of 1024), with or without iB."""
    match = SIZE.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 1000000, 512M or 4GiB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def _value_type(annotation: Any) -> Any:
    """`X | None` without None."""
    if isinstance(annotation, types.UnionType):
        (annotation,) = (a for a in typing.get_args(annotation) if a is not type(None))
    return annotation


def _options(name: str, kind: Any) -> dict[str, Any]:
    """What argparse is told of a field of this type."""
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if name.endswith("_bytes"):
        return {"type": parse_size, "metavar": "SIZE"}
    metavar = name.upper().rsplit("_", 1)[-1]
    if kind == list[str]:
        return {"nargs": "+", "action": "extend", "metavar": metavar}
    return {"type": kind, "metavar": {int: "N", float: "X"}.get(kind, metavar)}


def _help(entry: Field) -> str:
    text = entry.metadata["help"].replace("%", "%%")
    default = entry.default
    if default is None or default is MISSING:
        return text
    if entry.name.endswith("_bytes"):
        default = f"{default / UNITS['G']:g}G"
    return f"{text} (default: {default})"
