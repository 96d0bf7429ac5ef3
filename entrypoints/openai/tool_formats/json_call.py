"""Reads {"name": ..., "arguments": {...}} in pieces of any size, as most formats write calls."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

from loraplex.engine.structured_outputs.params import json_format
from loraplex.entrypoints.openai.tool_formats.base import CallArguments, CallBegin, Event, Tool

ARGUMENTS_KEYS = ("arguments", "parameters")
OTHER_KEYS = ("name", "type", "id")


class NotACall(Exception):
    """The text is no call of a known tool."""


class JsonValueReader:
    """Follows one JSON value to its end. It checks brackets and strings, no more."""

    def __init__(self) -> None:
        self.is_done = False
        self._depth = 0
        self._in_string = False
        self._is_escaped = False
        self._has_begun = False

    def push(self, character: str) -> bool:
        """Whether the character belongs to the value; `is_done` tells if it was the last."""
        if self._in_string:
            if self._is_escaped:
                self._is_escaped = False
            elif character == "\\":
                self._is_escaped = True
            elif character == '"':
                self._in_string = False
                self.is_done = self._depth == 0
            return True
        if character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]" and self._depth:
            self._depth -= 1
            self.is_done = self._depth == 0
        elif character in ",}]" and self._depth == 0:
            self.is_done = True  # It ended a number or a word, and is not part of it.
            return False
        elif character.isspace() and not self._has_begun:
            return False
        self._has_begun = True
        return True

    def take(self, text: str) -> tuple[str, str]:
        """(the part of the text that belongs to an object or list, the text after it)"""
        for index, character in enumerate(text):
            self.push(character)
            if self.is_done:
                return text[: index + 1], text[index + 1 :]
        return text, ""


class JsonCallReader:
    """One call. Arguments are passed on as they come, once the name is known."""

    def __init__(self, tool_names: Collection[str]) -> None:
        self.text = ""
        """All of it so far."""
        self.is_done = False
        self.is_refused = False
        """Whether it turned out to be no call of a known tool."""
        self.has_begun = False
        """Whether the call was told."""
        self._tool_names = tool_names
        self._place = "before the object"
        self._key = ""
        self._value = ""
        self._reader = JsonValueReader()
        self._arguments = ""
        """Those that came before the name."""
        self._name: str | None = None

    def push(self, text: str) -> tuple[list[Event], str]:
        """What the text gives, and what is left of it when the call is done or refused."""
        events: list[Event] = []
        for index, character in enumerate(text):
            self.text += character
            try:
                events += self._push(character)
            except NotACall:
                self.is_refused = True
            if self.is_done or self.is_refused:
                return events, text[index + 1 :]
        return events, ""

    def _push(self, character: str) -> list[Event]:
        match self._place:
            case "before the object":
                self._expect(character, "{", "before a key")
            case "before a key":
                if character == "}":
                    return self._finish()
                self._key = character
                self._expect(character, '",', "in a key" if character == '"' else self._place)
            case "in a key":
                self._key += character
                if character == '"' and not self._key.endswith('\\"'):
                    self._place = "before a colon"
            case "before a colon":
                if character == ":":
                    self._begin_value()
                else:
                    self._expect(character, "", self._place)
            case "in a value":
                return self._push_to_value(character)
        return []

    def _expect(self, character: str, expected: str, place: str) -> None:
        if not character.isspace():
            if character not in expected or not expected:
                raise NotACall
            self._place = place

    def _begin_value(self) -> None:
        try:
            self._key = json.loads(self._key)
        except ValueError:
            raise NotACall from None
        if self._key not in ARGUMENTS_KEYS + OTHER_KEYS:
            raise NotACall
        self._value, self._reader, self._place = "", JsonValueReader(), "in a value"

    def _push_to_value(self, character: str) -> list[Event]:
        events: list[Event] = []
        if self._reader.push(character):
            self._value += character
            if self._key in ARGUMENTS_KEYS:
                if self._value[0] != "{":
                    raise NotACall
                events += self._pass_on(character)
        elif self._reader.is_done and character == "}":
            events += self._finish()
        if self._reader.is_done:
            self._place = "before a key"
            if self._key == "name":
                events += self._begin_call()
        return events

    def _begin_call(self) -> list[Event]:
        try:
            name = json.loads(self._value)
        except ValueError:
            raise NotACall from None
        if name not in self._tool_names or self._name is not None:
            raise NotACall
        self._name = name
        return self._pass_on("") if self._arguments else []

    def _pass_on(self, text: str) -> list[Event]:
        self._arguments += text
        if self._name is None:
            return []
        events: list[Event] = [] if self.has_begun else [CallBegin(self._name)]
        self.has_begun = True
        events.append(CallArguments(self._arguments))
        self._arguments = ""
        return events

    def _finish(self) -> list[Event]:
        """The object ends. A call without arguments has none."""
        if self._name is None:
            raise NotACall
        self.is_done = True
        return [] if self.has_begun else self._pass_on("{}")


def call_tags(
    tools: Sequence[Tool], begin: str, end: str, arguments_key: str
) -> list[dict[str, Any]]:
    """xgrammar's tags for JSON calls between `begin` and `end`, one for each tool."""
    return [
        {
            "type": "tag",
            "begin": f'{begin}{{"name": {json.dumps(tool.name)}, "{arguments_key}": ',
            "content": json_format(tool.parameters),
            "end": "}" + end,
        }
        for tool in tools
    ]


def calls_only(tags: list[dict[str, Any]], separator: str, is_parallel: bool) -> dict[str, Any]:
    """xgrammar's format of one tag or, if is_parallel, several."""
    return {
        "type": "tags_with_separator",
        "tags": tags,
        "separator": separator,
        "at_least_one": True,
        "stop_after_first": not is_parallel,
    }
