"""What the text of an answer must look like, as the bodies of OpenAI's routes say it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from loraplex.engine.structured_outputs.params import StructuredOutputsParams
from loraplex.entrypoints.http.strict_model import StrictModel


class JsonSchemaFormat(StrictModel):
    name: str
    description: str | None = None
    """For people; the model gets to see none of this."""
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    """Any object, if it is left out."""
    strict: bool | None = None
    """Outputs keep to the schema either way."""


class ResponseFormat(StrictModel):
    """OpenAI's way to say what a text must look like."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchemaFormat | None = None
    format: dict[str, Any] | None = None
    """Of a structural tag."""

    @model_validator(mode="after")
    def check_parts(self) -> ResponseFormat:
        for name, of_type in (("json_schema", "json_schema"), ("format", "structural_tag")):
            if (getattr(self, name) is not None) != (self.type == of_type):
                raise ValueError(f"{name} must be given with type={of_type!r}, and only with it")
        return self

    def structured_outputs(self) -> StructuredOutputsParams | None:
        """Raises ValueError for a schema that is not allowed."""
        if self.type == "json_object":
            return StructuredOutputsParams(json_object=True)
        if self.json_schema is not None:
            schema = self.json_schema.schema_
            if schema is None:
                return StructuredOutputsParams(json_object=True)
            return StructuredOutputsParams(json=schema)
        if self.format is not None:
            tag = {"type": "structural_tag", "format": self.format}
            return StructuredOutputsParams(structural_tag=tag)
        return None


class StructuredOutputs(StrictModel):
    """vLLM's way to say it; see StructuredOutputsParams."""

    json_: Any = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Any = None
    disable_any_whitespace: bool = False

    def params(self) -> StructuredOutputsParams:
        """Raises ValueError for what is not allowed."""
        return StructuredOutputsParams(**self.model_dump(by_alias=True))
