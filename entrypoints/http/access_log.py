"""One line of JSON for each request: whose it was, what it took, how it ended. No secret, no text.

The request on its way is `current_visit`, wherever its task or one of its tasks runs.
"""

from __future__ import annotations

import logging
import sys
import time
import uuid
from collections.abc import Iterable
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

import msgspec
from starlette.types import Message, Scope, Send

from loraplex.engine.outputs import RequestMetrics, RequestOutput
from loraplex.entrypoints.http.api_keys import Caller

logger = logging.getLogger("loraplex.access")

MAX_REQUEST_ID_LENGTH = 128


def start_access_log() -> None:
    """Write the log to standard output, which holds nothing else."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.INFO)


def log_access(entry: dict[str, Any]) -> None:
    """Write the line, where start_access_log was called."""
    if logger.handlers:
        logger.info("%s", msgspec.json.encode(entry).decode())


class Visit:
    """One HTTP request on its way through the server."""

    def __init__(self, scope: Scope, headers: dict[bytes, bytes], send: Send) -> None:
        self.caller: Caller | None = None
        """Whose it is; None where the server has no keys."""
        self._scope = scope
        self._send = send
        self._started = time.monotonic()
        self._status = 0
        self._is_complete = False
        self._adapters: set[str] = set()
        self._num_prompt_tokens = 0
        self._num_output_tokens = 0
        self.fetch_seconds = 0.0
        """How long it waited for its adapter's files, to have the tokenizer."""
        self.times: RequestMetrics | None = None
        """Of the first generation that ended."""
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        is_fit = given.isascii() and given.isprintable() and len(given) <= MAX_REQUEST_ID_LENGTH
        self.request_id = given if given and is_fit else uuid.uuid4().hex

    @property
    def has_begun(self) -> bool:
        """Whether the client has been sent anything."""
        return self._status != 0

    async def send(self, message: Message) -> None:
        """Passes on to the client, with the request's id."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            request_id = (b"x-request-id", self.request_id.encode())
            message = {**message, "headers": [*message["headers"], request_id]}
        elif not message.get("more_body", False):
            self._is_complete = True
        await self._send(message)

    def admit_adapters(self, names: Iterable[str]) -> None:
        """Raises ApiError 403 for one that the caller may not use."""
        for name in names:
            if self.caller is not None:
                self.caller.check_adapter(name)
            self._adapters.add(name)

    def count_prompt(self, num_tokens: int) -> None:
        """A generation begins."""
        self._num_prompt_tokens += num_tokens
        self._spend(num_tokens)

    def count_output(self, output: RequestOutput) -> None:
        """A generation ended with this."""
        self.times = self.times or output.metrics
        num_tokens = sum(len(completion.token_ids) for completion in output.outputs)
        self._num_output_tokens += num_tokens
        self._spend(num_tokens)

    def _spend(self, num_tokens: int) -> None:
        if self.caller is not None:
            self.caller.spend_tokens(num_tokens)

    def entry(self) -> dict[str, Any]:
        """What there is to tell of it in the end."""
        client = self._scope.get("client")
        return {
            "time": datetime.now(UTC),
            "request_id": self.request_id,
            "client": client[0] if client else None,
            "key": self.caller.key.name if self.caller else None,
            "method": self._scope["method"],
            "path": self._scope["path"],
            "status": self._status,
            "complete": self._is_complete,
            "seconds": round(time.monotonic() - self._started, 4),
            "adapters": sorted(self._adapters),
            "prompt_tokens": self._num_prompt_tokens,
            "output_tokens": self._num_output_tokens,
        }


def may_see(adapter: str) -> bool:
    """Whether the caller of the request that is being answered may know of this adapter."""
    visit = current_visit.get()
    return visit is None or visit.caller is None or visit.caller.key.may_use(adapter)


current_visit: ContextVar[Visit | None] = ContextVar("current_visit", default=None)
