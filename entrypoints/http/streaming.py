"""Answers that take a while: server-sent events, and work that ends when its client goes away."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from loraplex.entrypoints.http.errors import ApiError, to_api_error

T = TypeVar("T")

# An error before the first event gets a status of its own, if it comes within so many seconds;
# then the client should see that it is being served.
HEAD_WAIT = 10.0
HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


async def unless(event: Coroutine[Any, Any, object], work: Awaitable[T]) -> T | None:
    """The result of `work`, which is cancelled if `event` ends first; then None."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(event)
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def unless_disconnected(receive: Receive, work: Awaitable[T]) -> T | None:
    """The result of `work`, which is cancelled if the client disconnects; then None."""
    return await unless(_wait_for_disconnect(receive), work)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def merge(
    iterators: Sequence[AsyncGenerator[T, None]],
) -> AsyncGenerator[tuple[int, T], None]:
    """What several iterators give, as it comes, with the iterator's index.

    The first error ends all of them, and so does closing this one.
    """
    if len(iterators) == 1:
        async with aclosing(iterators[0]) as only:
            async for item in only:
                yield 0, item
        return
    # One place: a slow reader slows the iterators down.
    queue: asyncio.Queue[tuple[int, T] | Exception | None] = asyncio.Queue(maxsize=1)

    async def pump(index: int) -> None:
        async with aclosing(iterators[index]) as iterator:
            async for item in iterator:
                await queue.put((index, item))

    async def pump_all() -> None:
        error: Exception | None = None
        try:
            async with asyncio.TaskGroup() as group:
                for index in range(len(iterators)):
                    group.create_task(pump(index))
        except ExceptionGroup as errors:
            error = errors.exceptions[0]
        await queue.put(error)

    pumping = asyncio.create_task(pump_all())
    try:
        while isinstance(entry := await queue.get(), tuple):
            yield entry
        if entry is not None:
            raise entry
    finally:
        pumping.cancel()
        await asyncio.gather(pumping, return_exceptions=True)


def json_error(error: Exception) -> Response:
    """The error as an answer."""
    api_error = to_api_error(error)
    seconds = api_error.retry_after
    return Response(
        msgspec.json.encode(api_error.body),
        api_error.status,
        headers=None if seconds is None else {"Retry-After": str(math.ceil(seconds))},
        media_type="application/json",
    )


def json_response(value: Any, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), headers=headers, media_type="application/json")


class EventStream(Response):
    """Server-sent events, one for each JSON text of `events`, then `last`.

    An error before the first event is an answer with a status, a later one is an event. `events`
    is closed when the client disconnects.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        headers: Mapping[str, str] | None = None,
        to_error: Callable[[Exception], ApiError] = to_api_error,
        last: bytes | None = b"[DONE]",
    ) -> None:
        self._events = events
        own = ((name.encode(), value.encode()) for name, value in (headers or {}).items())
        self._head = {
            "type": "http.response.start", "status": 200, "headers": [*HEADERS, *own],
        }  # fmt: skip
        self._to_error = to_error
        self._last = last
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await unless_disconnected(receive, self._serve(scope, receive, send))

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        first = asyncio.ensure_future(anext(self._events, None))
        try:
            await asyncio.wait({first}, timeout=HEAD_WAIT)
            if first.done() and isinstance(error := first.exception(), Exception):
                await json_error(self._to_error(error))(scope, receive, send)
                return
            await send(self._head)
            try:
                event = await first
                while event is not None:
                    await _send_event(send, event)
                    event = await anext(self._events, None)
            except Exception as error:
                await _send_event(send, msgspec.json.encode(self._to_error(error).body))
            if self._last is not None:
                await _send_event(send, self._last)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            # An iterator that is running can't be closed.
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            await self._events.aclose()


async def _send_event(send: Send, data: bytes) -> None:
    await send(
        {"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True}
    )
