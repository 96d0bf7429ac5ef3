"""Looks for a marker in text that comes in pieces."""

from __future__ import annotations


class TextUntil:
    """Passes text on up to a marker. What may be its beginning is held back."""

    def __init__(self, marker: str) -> None:
        self.held = ""
        self._marker = marker

    def push(self, text: str) -> tuple[str, bool, str]:
        """(text before the marker, whether the marker was found, the text after it)"""
        text = self.held + text
        before, marker, after = text.partition(self._marker)
        if marker:
            self.held = ""
            return before, True, after
        length = next(
            n
            for n in range(min(len(text), len(self._marker) - 1), -1, -1)
            if self._marker.startswith(text[len(text) - n :])
        )
        self.held = text[len(text) - length :]
        return text[: len(text) - length], False, ""
