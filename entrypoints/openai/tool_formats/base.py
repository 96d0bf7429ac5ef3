"""What a format of tool calls is, and what its parser gives."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Tool:
    name: str
    parameters: dict[str, Any]
    """A JSON schema of an object."""


@dataclass(frozen=True, slots=True)
class Content:
    """Text that is no call."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A call of this tool begins."""

    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of the JSON text of the last call's arguments."""

    text: str


Event = Content | CallBegin | CallArguments


class ToolParser(Protocol):
    """Finds the calls in one answer while it grows. Whatever is no call of a tool that was offered
    comes back as content, unchanged."""

    def push(self, text: str) -> list[Event]:
        """Take in more text."""

    def finish(self) -> list[Event]:
        """What was held back; no text comes after."""


class ToolFormat(Protocol):
    markers: tuple[str, ...]
    """Any of these in a chat template shows that its model writes this format."""
    opening: str
    """What precedes calls and can't be written in a grammar: it is put behind the prompt."""
    special_tokens: bool
    """Whether the format is only to be seen with special tokens as text."""

    def structural_tag(self, tools: Sequence[Tool], is_parallel: bool) -> dict[str, Any]:
        """What xgrammar needs to let the model write nothing but calls, one at least."""

    def make_parser(self, tool_names: Collection[str], is_forced: bool) -> ToolParser:
        """is_forced: the text comes behind `opening`."""
