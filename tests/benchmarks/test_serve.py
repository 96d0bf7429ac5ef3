"""The serving benchmark: its client against servers that misbehave on purpose, and a real run."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from server_process import running_server

from loraplex.benchmarks import completion_client, serve
from loraplex.benchmarks.completion_client import Call, Record, send_all

Handler = Callable[[dict, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def stub(handle: Handler) -> AsyncIterator[str]:
    """URL of a server that leaves the answer to `handle`."""

    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"POST /v1/completions HTTP/1.1\r\n")
        headers = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
        body = json.loads(await reader.readexactly(int(headers[b"Content-Length"])))
        body["authorization"] = headers.get(b"Authorization", b"").decode()
        await handle(body, writer)
        writer.close()

    async with await asyncio.start_server(serve_one, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def event(**fields) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def token(text: str = "x", finish_reason: str | None = None) -> bytes:
    return event(choices=[{"index": 0, "text": text, "finish_reason": finish_reason}])


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


async def ask(handle: Handler, timeout: float = 5.0, **call) -> Record:
    async with stub(handle) as url:
        records, _ = await send_all(url, [Call("m", [1, 2, 3], 4, **call)], timeout, "key")
    return records[0]


class Clock:
    """The client's. It stands still until the server moves it, with nothing on its way."""

    def __init__(self) -> None:
        self.now, self.num_reads = 0.0, 0

    def perf_counter(self) -> float:
        self.num_reads += 1
        return self.now


async def test_times_of_an_answer(monkeypatch):
    bodies, clock = [], Clock()
    monkeypatch.setattr(completion_client, "time", clock)

    async def answer(body, writer):
        bodies.append(body)
        for delay, data in [
            (0.0, None),
            (0.2, token()),
            (0.1, token()),
            (0.1, token() + token("")),
            (0.1, token("", "length") + event(choices=[], usage={"completion_tokens": 5})),
            (0.1, b"data: [DONE]\n\n"),
        ]:
            clock.now += delay
            num_reads = clock.num_reads
            writer.write(CHUNKED if data is None else chunk(data))
            while clock.num_reads == num_reads:
                await asyncio.sleep(0.001)
        writer.write(chunk(b""))

    record = await ask(answer)
    assert record.error is None
    # The event that only says how it ended is no token, and an empty text may be one.
    assert len(record.token_times) == 4
    assert record.ttft == pytest.approx(0.2)
    assert record.gaps == pytest.approx([0.1, 0.1, 0.0])
    assert record.e2e == record.token_times[-1]
    assert record.num_output_tokens == 5
    assert record.tpot == pytest.approx((record.e2e - record.ttft) / 4)
    (body,) = bodies
    assert body["authorization"] == "Bearer key"
    assert (body["model"], body["prompt"], body["max_tokens"]) == ("m", [1, 2, 3], 4)
    assert (body["temperature"], body["ignore_eos"], body["stream"]) == (0, True, True)


async def test_events_in_pieces_and_other_line_ends():
    text = b": a comment\r\n\r\n" + token("é").replace(b"\n", b"\r\n") + token() + token()

    async def answer(body, writer):
        writer.write(CHUNKED)
        for byte in text:
            writer.write(chunk(bytes([byte])))
            await writer.drain()
        writer.write(chunk(b""))

    record = await ask(answer)
    assert (record.error, record.num_output_tokens) == (None, 3)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"HTTP/1.1 429 Too Many\r\nContent-Length: 2\r\n\r\n{}", "HTTP 429"),
        (b"", "connection: closed early"),
        (CHUNKED + chunk(token()), "connection: closed early"),
        (CHUNKED + chunk(event(error={"message": "m"})) + chunk(b""), "in the stream"),
        (CHUNKED + chunk(b"data: {nonsense\n\n") + chunk(b""), "not understood: "),
        (CHUNKED + chunk(b"data: [DONE]\n\n") + chunk(b""), "no token"),
        (b"gibberish\r\n\r\n", "not understood: "),
    ],
)
async def test_errors_have_names(answer, error):
    async def handle(body, writer):
        writer.write(answer)

    record = await ask(handle)
    assert record.error is not None
    assert record.error.startswith(error)


async def test_an_answer_that_takes_too_long():
    async def never(body, writer):
        await asyncio.sleep(1)

    assert (await ask(never, timeout=0.1)).error == "timeout"


async def test_no_server():
    async with stub(lambda body, writer: asyncio.sleep(0)) as url:
        pass
    records, _ = await send_all(url, [Call("m", [1], 1)], 1.0)
    assert records[0].error == "connection: ConnectionRefusedError"


async def test_a_slow_server_does_not_slow_the_arrivals():
    num_arrived, all_arrived = 0, asyncio.Event()

    async def slow(body, writer):
        nonlocal num_arrived
        num_arrived += 1
        if num_arrived == len(calls):
            all_arrived.set()
        # Nobody is answered before the last has asked: a client that waits gets no answer.
        await all_arrived.wait()
        writer.write(CHUNKED + chunk(token("x", "length")) + chunk(b""))

    calls = [Call("m", [1], 1, i * 0.03) for i in range(20)]
    async with stub(slow) as url:
        records, _ = await send_all(url, calls, 30.0)
    assert [record.error for record in records] == [None] * len(calls)
    assert all(record.sent_time >= record.arrival_time for record in records)


def test_the_summary():
    fast = Record("a", 0.0, 8, 0.001, [0.1 + 0.01 * i for i in range(11)], 11, 0.2)
    slow = Record("a", 1.0, 8, 1.003, [4.0, 5.0], 2, 5.0)
    failed = Record("b", 2.0, 8, 2.0, [0.5], 1, 0.5, "HTTP 429")
    summary = serve.summarize([fast, slow, failed, failed], 10.0, slo_ttft=1.0, slo_tpot=0.02)
    assert (summary["completed"], summary["errors"]) == (2, {"HTTP 429": 2})
    assert summary["requests_per_second"] == 0.2
    assert summary["output_tokens_per_second"] == 1.3
    assert (summary["goodput_requests_per_second"], summary["good_share"]) == (0.1, 0.25)
    spread = summary["milliseconds"]
    assert spread["TTFT"] == {"mean": 2050, "p50": 2050, "p90": 3610, "p99": 3961}
    assert spread["TPOT"]["mean"] == pytest.approx((10 + 1000) / 2)
    assert spread["ITL"]["p50"] == pytest.approx(10), "one for each gap, not for each request"
    assert spread["E2E"]["mean"] == pytest.approx(2600)
    assert spread["send lateness"]["mean"] == pytest.approx(1)
    assert serve.summarize([fast, slow], 10.0, slo_tpot=0.02)["good_share"] == 0.5
    assert serve.summarize([fast, slow], 10.0)["good_share"] == 1
    assert serve.summarize([failed], 10.0)["milliseconds"]["TTFT"] is None


SHORT = ["--rate", "20", "--duration", "1", "--input-range", "8", "24", "--output-range", "4", "8"]


def run(tmp_path, *flags: str) -> tuple[int, dict, list[dict]]:
    output, details = tmp_path / "out.json", tmp_path / "details"
    status = serve.main([*SHORT, "--output", str(output), "--details", str(details), *flags])
    records = [json.loads(line) for line in details.read_text().splitlines()]
    return status, json.loads(output.read_text())["figures"], records


def test_a_running_server_and_its_adapters(tmp_path):
    for name in ("one", "two", "gone"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "gone").rename(tmp_path / "missing")
    modules = [f"{name}={tmp_path / name}" for name in ("one", "two", "missing")]
    with running_server("--lora-modules", *modules) as server:
        flags = ["--url", f"{server.url}/v1", "--vocab-size", "128"]
        status, figures, records = run(tmp_path, *flags, "--num-adapters", "2", "--seed", "1")
        assert (status, figures["completed"], figures["errors"]) == (0, 20, {})
        assert {record["model"] for record in records} == {"one", "two"}
        assert (tmp_path / "out.png").exists()
        status, figures, records = run(tmp_path, *flags)
        failed = [record["model"] for record in records if record["error"]]
        assert set(failed) == {"missing"}
        assert sum(figures["errors"].values()) == len(failed) == 20 - figures["completed"]
        status, _, records = run(tmp_path, *flags, "--adapters", "missing")
        assert status == 1, "nothing was answered"
        status, _, records = run(tmp_path, *flags, "--num-adapters", "0")
        assert len({record["model"] for record in records}) == 1
        with pytest.raises(ValueError, match="--num-adapters 9 is not allowed: the server has 3"):
            serve.main([*flags, "--num-adapters", "9"])
        with pytest.raises(ValueError, match="leave --url out"):
            serve.main([*flags, "--", "--max-num-seqs", "3"])
        with pytest.raises(ValueError, match="is the number of requests"):
            serve.main([*flags, "--rate", "1", "--duration", "0.5"])
    with pytest.raises(RuntimeError, match="/v1/models"):
        serve.main([*flags])


def test_a_server_of_its_own(tmp_path):
    status, figures, records = run(
        tmp_path, *("--shape", "tiny", "--num-adapters", "3", "--rank", "4", "--slo-ttft", "60"),
        *("--workload", "chat", "--turns", "2", "--think-time", "0.1", "--system-len", "20"),
        *("--", "--max-num-seqs", "16"),
    )  # fmt: skip
    assert (status, figures["completed"], figures["errors"]) == (0, 40, {})
    assert {record["model"] for record in records} == {"a0", "a1", "a2"}
    assert figures["server_flags"] == ["--max-num-seqs", "16"]
    assert all(4 <= record["num_output_tokens"] < 8 for record in records)
    # Every token is a word of the model's tokenizer, so that every one is seen to come.
    gaps = sum(len(record["token_times"]) - 1 for record in records)
    assert gaps >= 0.5 * sum(record["num_output_tokens"] - 1 for record in records)
    assert figures["good_share"] == 1


def test_a_server_that_does_not_start(tmp_path):
    with pytest.raises(RuntimeError, match="the server ended with exit code 2"):
        run(tmp_path, "--shape", "tiny", "--", "--block-size", "0")
