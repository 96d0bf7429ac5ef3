"""Errors of requests, and how they show values. No torch."""

from __future__ import annotations

from typing import Any


class RequestError(ValueError):
    """A request failed for a reason of its own; `status` is the HTTP status that fits, retry_after
    the seconds to wait before trying again, where that may help."""

    def __init__(self, message: str, status: int = 400, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


def describe(value: Any, limit: int = 200) -> str:
    """A value as an error message shows it: its repr, cut where it gets long."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
