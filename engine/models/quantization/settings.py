"""Reading a quantization_config: every field that changes what the weights mean is checked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any


def check_setting(config: dict[str, Any], field: str, allowed: Iterable[Any], default: Any) -> Any:
    """The field's value. Raises ValueError if it is none of those allowed."""
    value = config.get(field, default)
    if value not in (allowed := tuple(allowed)):
        raise unsupported(field, value, "one of " + ", ".join(map(repr, allowed)))
    return value


def unsupported(field: str, value: object, allowed: str) -> ValueError:
    return ValueError(
        f"quantization_config.{field}={value!r} of this model is not supported: it must be "
        f"{allowed}"
    )


def check_group_size(config: dict[str, Any]) -> int:
    """Inputs that share a scale; -1: all of them."""
    value = config.get("group_size", 128)
    if not isinstance(value, int) or (value != -1 and (value < 2 or value % 2)):
        raise unsupported("group_size", value, "-1 or an even number")
    return value


def check_divisible(module: str, what: str, size: int, divisor: int) -> None:
    if size % divisor:
        raise ValueError(
            f"{module} of this model has {size} {what}, which is no multiple of {divisor}, as its "
            "quantization_config wants"
        )


def with_current_names(value: Any, other_prefixes: Mapping[str, str]) -> Any:
    """A quantization_config, or a part of one, in which modules and patterns that begin as in older
    checkpoints begin as in the model. other_prefixes: see Decoder.OTHER_PREFIXES."""
    if isinstance(value, dict):
        return {name: with_current_names(part, other_prefixes) for name, part in value.items()}
    if isinstance(value, list):
        return [with_current_names(part, other_prefixes) for part in value]
    if isinstance(value, str):
        pattern, name = ("re:", value[3:]) if value.startswith("re:") else ("", value)
        for old, new in other_prefixes.items():
            if f"{name}.".startswith(old):
                return pattern + f"{new}{f'{name}.'.removeprefix(old)}".removesuffix(".")
    return value


class SkippedModules:
    """Modules that a quantization_config leaves out, by parts of their names or "re:" patterns."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = tuple(names)

    def __contains__(self, module: object) -> bool:
        """module: full name, e.g. "model.layers.0.mlp.up_proj"."""
        return any(_matches(name, str(module)) for name in self._names)


def _matches(name: str, module: str) -> bool:
    if name.startswith("re:"):
        return re.match(name[3:], module) is not None
    return f".{name}." in f".{module}."
