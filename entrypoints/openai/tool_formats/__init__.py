"""How models write calls of tools: one plug-in a file, chosen by name or by the chat template.

A format knows text and JSON schemas; it knows neither HTTP nor the engine. To add one, write a
ToolFormat and name it in TOOL_FORMATS.
"""

from __future__ import annotations

from loraplex.entrypoints.openai.tool_formats.base import ToolFormat
from loraplex.entrypoints.openai.tool_formats.hermes import HermesFormat
from loraplex.entrypoints.openai.tool_formats.llama3_json import Llama3Format
from loraplex.entrypoints.openai.tool_formats.mistral import MistralFormat

TOOL_FORMATS: dict[str, ToolFormat] = {
    "hermes": HermesFormat(),
    "llama3_json": Llama3Format(),
    "mistral": MistralFormat(),
}


def choose_tool_format(name: str, chat_template: str) -> ToolFormat:
    """The format of this name; with "auto" the one that the chat template writes, or Hermes's.

    Raises ValueError for a template that does not show tools to the model.
    """
    if "tools" not in chat_template:
        raise ValueError("tools is not allowed: the chat template of this model knows no tools")
    if name != "auto":
        return TOOL_FORMATS[name]
    for tool_format in TOOL_FORMATS.values():
        if any(marker in chat_template for marker in tool_format.markers):
            return tool_format
    return TOOL_FORMATS["hermes"]
