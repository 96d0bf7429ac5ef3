"""How a setting is declared: its default, its help, and what it may be. No torch."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def option(default: Any, help: str, is_secret: bool = False) -> Any:
    """A config field with its help text; a secret is left out of its config's repr."""
    return field(default=default, repr=not is_secret, metadata={"help": help})


def check_option(name: str, value: Any, is_allowed: bool, allowed: str) -> None:
    """Raises ValueError, naming the option, its value and what is allowed, if it is not."""
    if not is_allowed:
        raise ValueError(f"{name}={value!r} is not allowed: it must be {allowed}")
