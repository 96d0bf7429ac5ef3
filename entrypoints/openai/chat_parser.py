"""From the text of an answer to its message: reasoning, content and calls of tools.

How the models of a server write them is chosen once, by the server's options and chat templates.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from loraplex.entrypoints.openai.reasoning_formats import ReasoningFormat, ReasoningParser
from loraplex.entrypoints.openai.tool_formats.base import Content, Event, ToolFormat


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text that precedes the answer."""

    text: str


class MessageParser:
    """Finds the parts of one answer while it grows."""

    def __init__(
        self,
        reasoning: tuple[ReasoningFormat, bool] | None,
        tools: tuple[ToolFormat, Collection[str], bool] | None,
    ) -> None:
        """reasoning: the format, and whether the answer begins within it. tools: the format, the
        tools' names, and whether nothing but calls may come. None where there are none."""
        self._reasoning = ReasoningParser(*reasoning) if reasoning is not None else None
        self._tools = None
        if tools is not None:
            tool_format, names, is_forced = tools
            self._tools = tool_format.make_parser(names, is_forced)

    def push(self, text: str, is_final: bool) -> list[Event | Reasoning]:
        """Take in more text, of which nothing comes after if is_final."""
        parts: list[Event | Reasoning] = []
        if self._reasoning is not None:
            reasoning, text = self._reasoning.push(text)
            if is_final:
                more, rest = self._reasoning.finish()
                reasoning, text = reasoning + more, text + rest
            if reasoning:
                parts.append(Reasoning(reasoning))
        if self._tools is None:
            return [*parts, Content(text)] if text else parts
        parts += self._tools.push(text)
        if is_final:
            parts += self._tools.finish()
        return parts
