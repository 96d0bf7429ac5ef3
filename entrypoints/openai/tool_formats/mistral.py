"""Mistral: [TOOL_CALLS] and a JSON list of calls or, since the end of 2024, [TOOL_CALLS], the name
and, maybe behind [ARGS], the JSON object of the arguments, for each call."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from loraplex.entrypoints.openai.tool_formats.base import (
    CallArguments,
    CallBegin,
    Content,
    Event,
    Tool,
)
from loraplex.entrypoints.openai.tool_formats.json_call import (
    JsonValueReader,
    call_tags,
    calls_only,
)
from loraplex.entrypoints.openai.tool_formats.llama3_json import JsonCallsParser
from loraplex.entrypoints.openai.tool_formats.text import TextUntil

BEGIN, ARGUMENTS = "[TOOL_CALLS]", "[ARGS]"
SEPARATORS = " \t\r\n[],"


class MistralFormat:
    markers: tuple[str, ...] = (BEGIN,)
    opening = BEGIN
    special_tokens = True

    def structural_tag(self, tools: Sequence[Tool], is_parallel: bool) -> dict[str, Any]:
        calls = calls_only(call_tags(tools, "", "", "arguments"), ", ", is_parallel)
        parts = [
            {"type": "const_string", "value": "["},
            calls,
            {"type": "const_string", "value": "]"},
        ]
        return {"type": "sequence", "elements": parts}

    def make_parser(self, tool_names: Collection[str], is_forced: bool) -> MistralParser:
        return MistralParser(tool_names, is_forced)


class MistralParser:
    """Text, then calls: which of the two ways they are written in, their first character tells."""

    def __init__(self, tool_names: Collection[str], is_forced: bool) -> None:
        self._tool_names = tool_names
        self._before: TextUntil | None = None if is_forced else TextUntil(BEGIN)
        self._calls: JsonCallsParser | NamedCallsParser | None = None

    def push(self, text: str) -> list[Event]:
        events: list[Event] = []
        if self._before is not None:
            content, found, text = self._before.push(text)
            events += [Content(content)] if content else []
            if found:
                self._before = None
        if self._before is None and text:
            if self._calls is None:
                text = text.lstrip()
            if text and self._calls is None:
                is_list = text[0] == "["
                self._calls = (
                    JsonCallsParser(self._tool_names, SEPARATORS)
                    if is_list
                    else NamedCallsParser(self._tool_names)
                )
            if self._calls is not None:
                events += self._calls.push(text)
        return events

    def finish(self) -> list[Event]:
        if self._before is not None:
            return [Content(self._before.held)] if self._before.held else []
        return [] if self._calls is None else self._calls.finish()


class NamedCallsParser:
    """name[ARGS]{...}, or name{...}; [TOOL_CALLS] before each further one."""

    def __init__(self, tool_names: Collection[str]) -> None:
        self._tool_names = tool_names
        self._name = ""
        self._arguments: JsonValueReader | None = None
        self._is_content = False

    def push(self, text: str) -> list[Event]:
        events: list[Event] = []
        while text:
            if self._is_content:
                return [*events, Content(text)]
            if self._arguments is None:
                name, brace, arguments = text.partition("{")
                self._name += name
                if not brace:
                    break
                text = brace + arguments
                name = self._name.removeprefix(BEGIN).strip().removesuffix(ARGUMENTS).strip()
                if name not in self._tool_names:
                    self._is_content = True
                    events += self.finish()
                    continue
                self._name, self._arguments = "", JsonValueReader()
                events.append(CallBegin(name))
            taken, text = self._arguments.take(text)
            events.append(CallArguments(taken))
            if self._arguments.is_done:
                self._arguments = None
        return events

    def finish(self) -> list[Event]:
        rest, self._name = self._name, ""
        return [Content(rest)] if rest.strip() else []
