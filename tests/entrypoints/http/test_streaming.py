"""Merging iterators, and events over ASGI."""

from __future__ import annotations

import asyncio

import pytest

from loraplex.entrypoints.http import streaming
from loraplex.entrypoints.http.streaming import EventStream, merge, unless


class Numbers:
    """Iterators of 0, 1, 2, ... that know whether they were closed."""

    def __init__(self) -> None:
        self.num_closed = 0
        self.num_given = 0

    async def count(self, end: int, error: Exception | None = None):
        try:
            for number in range(end):
                await asyncio.sleep(0)
                self.num_given += 1
                yield number
            if error is not None:
                raise error
        finally:
            self.num_closed += 1


@pytest.mark.parametrize("num_iterators", [1, 3])
async def test_merge_gives_all_of_all(num_iterators):
    numbers = Numbers()
    items = [item async for item in merge([numbers.count(4) for _ in range(num_iterators)])]
    assert sorted(items) == [(i, number) for i in range(num_iterators) for number in range(4)]
    assert numbers.num_closed == num_iterators


@pytest.mark.parametrize("num_others", [0, 2])
async def test_merge_ends_with_the_first_error(num_others):
    numbers = Numbers()
    others = [numbers.count(10**9) for _ in range(num_others)]
    with pytest.raises(KeyError, match="x"):
        async for _ in merge([numbers.count(2, KeyError("x")), *others]):
            pass
    assert numbers.num_closed == 1 + num_others
    assert len(asyncio.all_tasks()) == 1


async def test_closing_merge_closes_the_iterators_and_a_slow_reader_slows_them():
    numbers = Numbers()
    merged = merge([numbers.count(10**9) for _ in range(3)])
    await anext(merged)
    await asyncio.sleep(0.05)
    assert numbers.num_given < 10
    await merged.aclose()
    assert numbers.num_closed == 3
    assert len(asyncio.all_tasks()) == 1


async def test_unless():
    assert await unless(asyncio.sleep(60), asyncio.sleep(0, "result")) == "result"
    cancelled = asyncio.Event()

    async def work() -> str:
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()
        return "never"

    assert await unless(asyncio.sleep(0), work()) is None
    assert cancelled.is_set()
    with pytest.raises(ZeroDivisionError):
        await unless(asyncio.sleep(60), asyncio.to_thread(lambda: 1 / 0))


class Client:
    """The other side of an ASGI application."""

    def __init__(self) -> None:
        self.sent: list[dict] = []
        self.gone = asyncio.Event()

    async def receive(self) -> dict:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict) -> None:
        self.sent.append(message)

    @property
    def status(self) -> int:
        return self.sent[0]["status"]

    @property
    def text(self) -> str:
        return b"".join(message["body"] for message in self.sent[1:]).decode()


async def call(client: Client, events) -> None:
    await EventStream(events)({"type": "http"}, client.receive, client.send)


async def test_events():
    async def events():
        yield b"1"
        yield b"2"

    client = Client()
    await call(client, events())
    assert client.status == 200
    assert client.text == "data: 1\n\ndata: 2\n\ndata: [DONE]\n\n"
    assert [message.get("more_body") for message in client.sent[1:]] == [True, True, True, False]


async def test_an_error_before_the_first_event_is_a_status():
    async def events():
        raise ValueError("top_p=3 is not allowed")
        yield b""

    client = Client()
    await call(client, events())
    assert client.status == 400
    assert '"param":"top_p"' in client.text


async def test_a_late_error_is_an_event(monkeypatch):
    monkeypatch.setattr(streaming, "HEAD_WAIT", 0.01)

    async def events():
        await asyncio.sleep(0.1)
        raise ValueError("top_p=3 is not allowed")
        yield b""

    client = Client()
    await call(client, events())
    assert client.status == 200
    assert client.text.startswith('data: {"error":{"message":"top_p=3')
    assert client.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("num_events", [0, 1])
async def test_a_disconnect_closes_the_events(num_events):
    closed = asyncio.Event()

    async def events():
        try:
            for _ in range(num_events):
                yield b"1"
            await asyncio.sleep(60)
        finally:
            closed.set()

    client = Client()
    asyncio.get_running_loop().call_later(0.05, client.gone.set)
    await asyncio.wait_for(call(client, events()), timeout=1)
    assert closed.is_set()
    assert len(asyncio.all_tasks()) == 1
