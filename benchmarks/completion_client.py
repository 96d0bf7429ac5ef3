"""A client for streamed completions that costs little enough to measure thousands a second.

Sends each request at its time, whatever became of those before (open loop), over a connection of
its own. Knows OpenAI's wire format, and no workload.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import msgspec

DONE = b"[DONE]"


@dataclass(slots=True)
class Record:
    """What became of a request. All times are in seconds."""

    model: str
    arrival_time: float
    """When it was due, after the start of the run."""
    num_prompt_tokens: int
    sent_time: float | None = None
    """When it was sent, after the start of the run."""
    token_times: list[float] = field(default_factory=list)
    """When text came, after it was sent; an event may bring several tokens."""
    num_output_tokens: int = 0
    e2e: float | None = None
    """When the last text came, after it was sent."""
    error: str | None = None
    """Why it failed, in words that are alike for like errors."""

    @property
    def lateness(self) -> float:
        """How much later than due it was sent, connecting included: if this is not small, the
        client was too slow."""
        return (self.sent_time or self.arrival_time) - self.arrival_time

    @property
    def ttft(self) -> float | None:
        """Time to the first token."""
        return self.token_times[0] if self.token_times else None

    @property
    def tpot(self) -> float | None:
        """Time for each token after the first; None if there is only one."""
        if self.num_output_tokens < 2 or self.e2e is None or self.ttft is None:
            return None
        return (self.e2e - self.ttft) / (self.num_output_tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Between one event with text and the next."""
        return [b - a for a, b in zip(self.token_times, self.token_times[1:], strict=False)]


class _Choice(msgspec.Struct):
    text: str | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decoder = msgspec.json.Decoder(_Event)


@dataclass(frozen=True)
class Call:
    """A request to send."""

    model: str
    prompt_token_ids: list[int]
    max_tokens: int
    arrival_time: float = 0.0

    def body(self) -> bytes:
        return msgspec.json.encode(
            {
                "model": self.model,
                "prompt": self.prompt_token_ids,
                "max_tokens": self.max_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        )


async def send_all(
    url: str, calls: Sequence[Call], timeout: float, api_key: str | None = None
) -> tuple[list[Record], float]:
    """Send the calls, in order of arrival_time, to the server at `url` (without /v1).

    Returns a record for each, and the seconds until the last one was answered.
    timeout: seconds for each answer.
    """
    records = [Record(call.model, call.arrival_time, len(call.prompt_token_ids)) for call in calls]
    # Made before the start, because making them takes time that the sending must not wait for.
    address = urlsplit(url)
    messages = [_http_request(address.netloc, address.path, call, api_key) for call in calls]
    start = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for record, message in zip(records, messages, strict=True):
            delay = start + record.arrival_time - time.perf_counter()
            if delay > 0:
                await asyncio.sleep(delay)
            group.create_task(_send(url, message, record, start, timeout))
    return records, time.perf_counter() - start


def _http_request(host: str, root: str, call: Call, api_key: str | None) -> bytes:
    body = call.body()
    lines = [
        f"POST {root.rstrip('/')}/v1/completions HTTP/1.1",
        f"Host: {host}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Connection: close",
        *([f"Authorization: Bearer {api_key}"] if api_key else []),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def _send(url: str, message: bytes, record: Record, start: float, timeout: float) -> None:
    address = urlsplit(url)
    is_secure = address.scheme == "https"
    assert address.hostname is not None
    transport = None
    try:
        async with asyncio.timeout(timeout):
            transport, stream = await asyncio.get_running_loop().create_connection(
                lambda: _CompletionStream(message, record, start),
                address.hostname,
                address.port or (443 if is_secure else 80),
                ssl=is_secure or None,
            )
            await stream.done
    except TimeoutError:
        record.error = "timeout"
    except OSError as error:
        record.error = f"connection: {type(error).__name__}"
    finally:
        if transport is not None:
            transport.abort()


class _CompletionStream(asyncio.Protocol):
    """One request and its answer, into a record."""

    def __init__(self, message: bytes, record: Record, start: float) -> None:
        self.done = asyncio.get_running_loop().create_future()
        self._message = message
        self._record = record
        self._start = start
        self._sent = start
        self._now = start
        self._parser = httptools.HttpResponseParser(self)
        self._pending = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._sent = time.perf_counter()
        self._record.sent_time = self._sent - self._start
        # uvloop's transports have the methods of WriteTransport, and another ancestor.
        cast(asyncio.WriteTransport, transport).write(self._message)

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, msgspec.DecodeError) as error:
            self._end(f"not understood: {type(error).__name__}")

    def connection_lost(self, exception: Exception | None) -> None:
        self._end("connection: closed early")

    def on_body(self, body: bytes) -> None:
        if self._parser.get_status_code() != 200:
            return
        *lines, self._pending = (self._pending + body).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                payload = line[5:].strip()
                if payload != DONE:
                    self._take(_decoder.decode(payload))

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        self._end(None if status == 200 else f"HTTP {status}")

    def _take(self, event: _Event) -> None:
        record = self._record
        if event.error is not None:
            record.error = "in the stream"
        for choice in event.choices:
            # The end may come in an event of its own, which brings no token.
            if choice.text or choice.finish_reason is None or not record.token_times:
                record.token_times.append(self._now - self._sent)
                record.e2e = self._now - self._sent
        if event.usage is not None:
            record.num_output_tokens = event.usage.completion_tokens

    def _end(self, error: str | None) -> None:
        if self.done.done():
            return
        record = self._record
        record.error = record.error or error
        if record.error is None and not record.token_times:
            record.error = "no token"
        record.num_output_tokens = record.num_output_tokens or len(record.token_times)
        self.done.set_result(None)
