"""What the text of an output must look like: a JSON schema, a regular expression, ... Pure data.

The names are vLLM's. Grammars are made of this in `grammar`.
"""

from __future__ import annotations

import json as json_module
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from loraplex.engine.structured_outputs.json_schema import check_schema

# Of a schema or grammar. Compiling takes longer than in proportion.
MAX_CHARACTERS = 64 * 1024
# Between two tokens of JSON. A model that has nothing to say may go on with blanks without end.
MAX_WHITESPACE = 20


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """Exactly one of the fields up to structural_tag says what an output must be.

    Raises ValueError, naming the field, the value and what is allowed. What only compiling finds
    wrong is the request's error.
    """

    json: Any = None
    """A JSON schema, as text or as what json.loads gives; kept as text."""
    regex: str | None = None
    """A regular expression for the whole output."""
    choice: tuple[str, ...] | None = None
    """The output is one of these."""
    grammar: str | None = None
    """A context-free grammar in EBNF, as llama.cpp writes it; its first rule is `root`."""
    json_object: bool | None = None
    """Any JSON object."""
    structural_tag: Any = None
    """xgrammar's structural tags, as text or as what json.loads gives; kept as text."""
    disable_any_whitespace: bool = False
    """JSON without whitespace but for a space after commas and colons."""

    def __post_init__(self) -> None:
        # The object is frozen; this is its construction.
        for name in ("json", "structural_tag"):
            object.__setattr__(self, name, _as_json(name, getattr(self, name)))
        if self.choice is not None:
            object.__setattr__(self, "choice", _as_choices(self.choice))
        given = [name for name in KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise ValueError(
                f"structured_outputs={' and '.join(given) or None} is not allowed: it must have "
                f"exactly one of {', '.join(KINDS)}"
            )
        value = getattr(self, given[0])
        if given[0] in ("regex", "grammar") and not (isinstance(value, str) and value):
            _refuse(given[0], value, "a non-empty string")
        if len(self.text) > MAX_CHARACTERS:
            _refuse(given[0], f"{len(self.text)} characters", f"at most {MAX_CHARACTERS}")
        if given[0] == "json":
            check_schema(json_module.loads(value), "structured_outputs.json")

    @property
    def kind(self) -> str:
        """Which of KINDS it is."""
        return next(name for name in KINDS if getattr(self, name) not in (None, False))

    @property
    def text(self) -> str:
        """The value of that field, as text."""
        value = getattr(self, self.kind)
        return value if isinstance(value, str) else json_module.dumps(value)

    def as_format(self) -> dict[str, Any]:
        """The same as a part of a structural tag."""
        match self.kind:
            case "json":
                return json_format(json_module.loads(self.json))
            case "json_object":
                return json_format({"type": "object"})
            case "regex":
                return {"type": "regex", "pattern": self.regex}
            case "grammar":
                return {"type": "grammar", "grammar": self.grammar}
            case "choice":
                values = [{"type": "const_string", "value": choice} for choice in self.choice or ()]
                return {"type": "or", "elements": values}
            case _:
                return json_module.loads(self.structural_tag)["format"]


KINDS = tuple(f.name for f in fields(StructuredOutputsParams) if f.name != "disable_any_whitespace")


def json_format(schema: Any) -> dict[str, Any]:
    """JSON by a schema, as a part of a structural tag."""
    return {"type": "json_schema", "json_schema": schema, "max_whitespace_cnt": MAX_WHITESPACE}


def _as_json(name: str, value: Any) -> str | None:
    """The JSON text of a value that is JSON text already or an object."""
    if value is None:
        return None
    try:
        if isinstance(value, str):
            parsed, text = json_module.loads(value), value
        else:
            parsed, text = value, json_module.dumps(value, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"structured_outputs.{name} is not allowed: it is no JSON: {error}"
        ) from error
    if not isinstance(parsed, Mapping | bool):
        _refuse(name, value, "a JSON object")
    return text


def _as_choices(value: Any) -> tuple[str, ...]:
    is_allowed = isinstance(value, list | tuple) and all(isinstance(c, str) and c for c in value)
    if not (is_allowed and value):
        _refuse("choice", value, "a non-empty list of non-empty strings")
    return tuple(value)


def _refuse(name: str, value: Any, allowed: str) -> None:
    text = repr(value)
    text = text if len(text) <= 200 else text[:197] + "..."
    raise ValueError(f"structured_outputs.{name}={text} is not allowed: it must be {allowed}")
