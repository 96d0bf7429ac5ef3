"""Llama 3: the whole answer is a JSON object {"name": ..., "parameters": {...}}, or several with
semicolons between them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from loraplex.entrypoints.openai.tool_formats.base import Content, Event, Tool
from loraplex.entrypoints.openai.tool_formats.json_call import (
    JsonCallReader,
    call_tags,
    calls_only,
)

SEPARATORS = " \t\r\n;,"


class Llama3Format:
    markers: tuple[str, ...] = (
        '{"name": function name, "parameters": dictionary',
        "<|python_tag|>",
    )
    opening = ""
    special_tokens = False

    def structural_tag(self, tools: Sequence[Tool], is_parallel: bool) -> dict[str, Any]:
        return calls_only(call_tags(tools, "", "", "parameters"), "; ", is_parallel)

    def make_parser(self, tool_names: Collection[str], is_forced: bool) -> JsonCallsParser:
        return JsonCallsParser(tool_names, SEPARATORS)


class JsonCallsParser:
    """Calls one after the other, with nothing but separators between them. From the first text on
    that is none, all is content."""

    def __init__(self, tool_names: Collection[str], separators: str) -> None:
        self._tool_names = tool_names
        self._separators = separators
        self._between: str | None = ""
        """Separators, which are content before text that is no call. None behind a call."""
        self._call: JsonCallReader | None = None
        self._is_content = False

    def push(self, text: str) -> list[Event]:
        events: list[Event] = []
        while text:
            if self._is_content:
                return [*events, Content(text)]
            if self._call is None:
                call_text = text.lstrip(self._separators)
                if self._between is not None:
                    self._between += text.removesuffix(call_text)
                if not call_text:
                    break
                self._call, text = JsonCallReader(self._tool_names), call_text
            found, text = self._call.push(text)
            events += found
            if self._call.is_refused:
                events += self._give_up(self._call)
            elif self._call.is_done:
                self._call, self._between = None, None
        return events

    def finish(self) -> list[Event]:
        if self._call is not None:
            return self._give_up(self._call)
        return [Content(self._between)] if self._between and not self._is_content else []

    def _give_up(self, call: JsonCallReader) -> list[Event]:
        self._is_content, self._call = True, None
        return [] if call.has_begun else [Content((self._between or "") + call.text)]
