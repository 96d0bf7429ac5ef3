"""How a setting is declared: its default, its help, and what it may be. No torch."""

from __future__ import annotations

import typing
from dataclasses import field, fields
from typing import Any

KINDS = {
    bool: "True or False",
    int: "an integer",
    float: "a number",
    str: "a string",
    list[str]: "a list of strings",
}


def option(default: Any, help: str, is_secret: bool = False) -> Any:
    """A config field with its help text; a secret is left out of its config's repr."""
    return field(default=default, repr=not is_secret, metadata={"help": help})


def check_option(name: str, value: Any, is_allowed: bool, allowed: str) -> None:
    """Raises ValueError, naming the option, its value and what is allowed, if it is not."""
    if not is_allowed:
        raise ValueError(f"{name}={value!r} is not allowed: it must be {allowed}")


def check_types(config: Any) -> None:
    """Raises ValueError for a field of a config, which is a dataclass, of the wrong type."""
    hints = typing.get_type_hints(type(config))
    for entry in fields(config):
        value, hint = getattr(config, entry.name), hints[entry.name]
        kinds = typing.get_args(hint) if type(None) in typing.get_args(hint) else (hint,)
        if not any(_is_a(value, kind) for kind in kinds):
            words = " or ".join(KINDS.get(kind, "None") for kind in kinds)
            shown = value if entry.repr else "..."
            check_option(entry.name, shown, False, words)


def _is_a(value: Any, kind: Any) -> bool:
    if kind == list[str]:
        return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
    if kind is float:
        kind = int | float
    # True is an integer to Python, and a mistake to users.
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
