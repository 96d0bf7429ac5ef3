"""Hermes, Qwen and others: <tool_call>, a JSON object and </tool_call>, for each call."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from loraplex.entrypoints.openai.tool_formats.base import Content, Event, Tool
from loraplex.entrypoints.openai.tool_formats.json_call import (
    JsonCallReader,
    call_tags,
    calls_only,
)
from loraplex.entrypoints.openai.tool_formats.text import TextUntil

BEGIN, END = "<tool_call>", "</tool_call>"


class HermesFormat:
    markers: tuple[str, ...] = (BEGIN,)
    opening = ""
    special_tokens = False

    def structural_tag(self, tools: Sequence[Tool], is_parallel: bool) -> dict[str, Any]:
        tags = call_tags(tools, f"{BEGIN}\n", f"\n{END}", "arguments")
        return calls_only(tags, "\n", is_parallel)

    def make_parser(self, tool_names: Collection[str], is_forced: bool) -> HermesParser:
        return HermesParser(tool_names)


class HermesParser:
    def __init__(self, tool_names: Collection[str]) -> None:
        self._tool_names = tool_names
        self._before = TextUntil(BEGIN)
        self._call: JsonCallReader | None = None
        self._after: TextUntil | None = None
        self._blanks: str | None = None
        """Between calls they are nothing to tell. None where no call was just before."""

    def push(self, text: str) -> list[Event]:
        events: list[Event] = []
        while text:
            if self._after is not None:
                _, found, text = self._after.push(text)
                if found:
                    self._after = None
            elif self._call is not None:
                found_events, text = self._push_to_call(self._call, text)
                events += found_events
            else:
                content, found, text = self._before.push(text)
                events += self._content(content)
                if found:
                    self._call = JsonCallReader(self._tool_names)
        return events

    def finish(self) -> list[Event]:
        if self._call is not None and not self._call.has_begun:
            return [Content(BEGIN + self._call.text)]
        return self._content(self._before.held) if self._after is None else []

    def _push_to_call(self, call: JsonCallReader, text: str) -> tuple[list[Event], str]:
        """What a part of the text gives, and the rest of it."""
        events, text = call.push(text)
        if call.is_done or call.is_refused:
            self._call = None
            if call.is_done:
                self._blanks = ""
            if call.has_begun:
                self._after = TextUntil(END)
            else:
                events.append(Content(BEGIN + call.text))
        return events, text

    def _content(self, text: str) -> list[Event]:
        if self._blanks is not None:
            text = self._blanks + text
            self._blanks = text if not text.strip() else None
            if self._blanks is not None:
                return []
        return [Content(text)] if text else []
