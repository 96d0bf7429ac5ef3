"""How models set their reasoning apart from the answer: between two tags, whose names differ.

To add a format, add its tags to REASONING_FORMATS.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loraplex.entrypoints.openai.tool_formats.text import TextUntil


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    begin: str
    end: str

    def is_open(self, prompt_end: str) -> bool:
        """Whether the answer begins within the reasoning, since the prompt ends there."""
        return prompt_end.rstrip().endswith(self.begin)

    def structural_tag(self, is_open: bool, answer: dict[str, Any]) -> dict[str, Any]:
        """xgrammar's format of an answer with reasoning before it: without bounds, as it comes."""
        tag = {
            "type": "tag",
            "begin": "" if is_open else self.begin,
            "content": {"type": "any_text"},
            "end": self.end,
        }
        blanks = {"type": "regex", "pattern": "\\n{0,2}"}
        reasoning: dict[str, Any] = {"type": "sequence", "elements": [tag, blanks]}
        if not is_open:
            reasoning = {"type": "optional", "content": reasoning}
        return {"type": "sequence", "elements": [reasoning, answer]}


REASONING_FORMATS = {
    "think": ReasoningFormat("<think>", "</think>"),
    "mistral": ReasoningFormat("[THINK]", "[/THINK]"),
}


def choose_reasoning_format(name: str, chat_template: str) -> ReasoningFormat | None:
    """The format of this name; with "auto" the one whose tags the chat template has, if any."""
    if name == "none":
        return None
    if name != "auto":
        return REASONING_FORMATS[name]
    found = (f for f in REASONING_FORMATS.values() if f.end in chat_template)
    return next(found, None)


class ReasoningParser:
    """Splits one answer while it grows: (reasoning, rest)."""

    def __init__(self, reasoning_format: ReasoningFormat, is_open: bool) -> None:
        self._begin = reasoning_format.begin
        self._end = TextUntil(reasoning_format.end)
        self._place = "reasoning" if is_open else "start"
        self._start = ""

    def push(self, text: str) -> tuple[str, str]:
        """Take in more text."""
        if self._place == "start":
            text = self._start + text
            begun = text.lstrip()
            if begun.startswith(self._begin):
                self._place, text = "reasoning", begun.removeprefix(self._begin)
            elif self._begin.startswith(begun):
                self._start = text
                return "", ""
            else:
                self._place = "answer"
        if self._place == "answer":
            return "", text
        reasoning = ""
        if self._place == "reasoning":
            reasoning, is_over, text = self._end.push(text)
            if is_over:
                self._place = "blank lines"
        text = text.lstrip("\n")
        if text:
            self._place = "answer"
        return reasoning, text

    def finish(self) -> tuple[str, str]:
        """What was held back; no text comes after."""
        if self._place == "start":
            return "", self._start
        return (self._end.held, "") if self._place == "reasoning" else ("", "")
