"""Tools in the bodies of chats: what is offered, what is to be called, and what was."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field, model_validator

from loraplex.engine.errors import describe
from loraplex.entrypoints.http.strict_model import StrictModel
from loraplex.entrypoints.openai.tool_formats.base import Tool

ANY_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}}


class FunctionDefinition(StrictModel):
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    """Calls that are required keep to the parameters' schema either way."""


class ToolDefinition(StrictModel):
    type: Literal["function"]
    function: FunctionDefinition

    def for_template(self) -> dict[str, Any]:
        """As chat templates know tools: all of the fields are there."""
        function = self.function
        return {
            "type": "function",
            "function": {
                "name": function.name,
                "description": function.description or "",
                "parameters": function.parameters or ANY_ARGUMENTS,
            },
        }

    def tool(self) -> Tool:
        return Tool(self.function.name, self.function.parameters or ANY_ARGUMENTS)


class FunctionName(StrictModel):
    name: str


class NamedToolChoice(StrictModel):
    type: Literal["function"]
    function: FunctionName


class FunctionCall(StrictModel):
    name: str
    arguments: str

    @model_validator(mode="after")
    def check_arguments(self) -> FunctionCall:
        try:
            arguments = json.loads(self.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise ValueError(f"arguments={describe(self.arguments)} must be JSON of an object")
        return self


class ToolCallOfMessage(StrictModel):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None
    """Some clients send back what they got in a stream."""

    def for_template(self) -> dict[str, Any]:
        """As chat templates know calls: their arguments are objects."""
        arguments = json.loads(self.function.arguments or "{}")
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}
