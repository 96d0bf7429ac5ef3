"""Where a request's output waits for whoever reads it."""

from __future__ import annotations

import asyncio
import copy

from loraplex.engine.outputs import RequestOutput


class LatestOutput:
    """The latest output of one request. It holds one, however slow the reader is."""

    def __init__(self, engine_request_ids: list[str]) -> None:
        self.engine_request_ids = engine_request_ids
        self.is_finished = False
        self._latest: RequestOutput | None = None
        self._error: Exception | None = None
        self._changed = asyncio.Event()

    def put(self, output: RequestOutput) -> None:
        self._latest = output
        self.is_finished = output.finished
        self._changed.set()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._changed.set()

    async def get(self) -> RequestOutput:
        """Wait for an output newer than the last one. Raises what it failed with."""
        await self._changed.wait()
        if self._latest is None:
            assert self._error is not None
            raise copy.copy(self._error)
        output, self._latest = self._latest, None
        if self._error is None:
            self._changed.clear()
        return output
