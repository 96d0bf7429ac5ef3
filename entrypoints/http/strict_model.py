"""What all request bodies are: JSON objects of known fields, whose values have the very types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from loraplex.engine.errors import describe


class StrictModel(BaseModel):
    """A JSON object without unknown fields, whose values have the very types."""

    model_config = ConfigDict(extra="forbid", strict=True)
    neutral_values: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    ignored_fields: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def drop_what_asks_for_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, values in cls.neutral_values.items():
            value = data.get(name)
            if value is not None and value not in values:
                raise PydanticCustomError(
                    "unsupported",
                    "{field}={value} is not supported",
                    {"field": name, "value": describe(value)},
                )
        dropped = cls.ignored_fields | cls.neutral_values.keys()
        return {name: value for name, value in data.items() if name not in dropped}
