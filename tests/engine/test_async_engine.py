"""AsyncEngine with a real engine process, in which a FakeCore runs."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
import time
from contextlib import aclosing
from pathlib import Path

import psutil
import pytest
from fakes import ByteTokenizer
from server_process import wait_until_gone

from loraplex.engine.async_engine import AsyncEngine
from loraplex.engine.config import EngineConfig
from loraplex.engine.core_client import EngineDeadError
from loraplex.engine.errors import RequestError
from loraplex.engine.lora_request import LoRARequest
from loraplex.engine.sampling_params import SamplingParams

LONG = SamplingParams(max_tokens=1000)


@pytest.fixture
async def engine(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    engine = AsyncEngine(EngineConfig(), "fake_core:make_core", ByteTokenizer())
    await engine.start()
    yield engine
    assert engine.num_open_requests == 0
    if not engine.errored:
        await wait_until_idle(engine)
    await engine.shutdown()
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert_nothing_left(tmp_path)


def assert_nothing_left(directory: Path) -> None:
    assert list(directory.iterdir()) == [], "the sockets' directory is gone"
    assert core_processes() == []


def core_processes() -> list[psutil.Process]:
    # Not theirs: other tests' servers have engine processes as well.
    children = psutil.Process().children()
    return [c for c in children if "run_engine_process" in " ".join(c.cmdline())]


async def wait_until_idle(engine: AsyncEngine) -> dict:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        stats = await engine.stats()
        if stats["num_running"] + stats["num_waiting"] == 0:
            return stats
        await asyncio.sleep(0.01)
    raise AssertionError(f"the core is not idle: {stats}")


async def run(engine: AsyncEngine, prompt, params=LONG, **options) -> list:
    return [output async for output in engine.generate(prompt, params, **options)]


async def test_outputs_are_cumulative_and_end_finished(engine):
    outputs = await run(engine, "hello")
    texts = [output.outputs[0].text for output in outputs]
    assert texts[-1] == "hello"
    assert all(later.startswith(earlier) for earlier, later in zip(texts, texts[1:], strict=False))
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert outputs[-1].outputs[0].finish_reason == "stop"


async def test_without_streaming_only_the_end_comes(engine):
    (output,) = await run(engine, "hello", stream=False)
    assert (output.outputs[0].text, output.finished) == ("hello", True)


async def test_many_requests_at_once_get_their_own_text(engine):
    prompts = [f"request number {i}" for i in range(64)]
    results = await asyncio.gather(*(run(engine, prompt) for prompt in prompts))
    assert [outputs[-1].outputs[0].text for outputs in results] == prompts


async def test_token_ids_dicts_and_several_completions(engine):
    outputs = await run(engine, list(b"ids"), SamplingParams(n=3, max_tokens=50))
    assert [c.text for c in outputs[-1].outputs] == ["ids"] * 3
    outputs = await run(engine, {"prompt_token_ids": list(b"dict")})
    assert outputs[-1].outputs[0].text == "dict"


async def test_a_stop_string_ends_the_request_in_the_core(engine):
    params = SamplingParams(max_tokens=1000, stop=("d",))
    outputs = await run(engine, "long", params)
    assert outputs[-1].outputs[0].text == "abc"
    assert outputs[-1].outputs[0].stop_reason == "d"
    stats = await wait_until_idle(engine)
    assert stats["output_tokens"] < 200


async def test_a_long_text_is_tokenised_in_a_thread(engine):
    with pytest.raises(ValueError, match="max_model_len"):
        await run(engine, "x" * 100_000)


async def test_what_the_input_processor_refuses_never_reaches_the_core(engine):
    with pytest.raises(ValueError, match="max_model_len"):
        await run(engine, "x" * 2000)
    assert (await engine.stats())["num_seen"] == 0


@pytest.mark.parametrize(("path", "status"), [("/missing", 404), ("/broken", 400)])
async def test_a_refused_adapter_fails_its_request_only(engine, path, status):
    bad = run(engine, "hello", lora_request=LoRARequest("bad", path))
    good = run(engine, "hello", lora_request=LoRARequest("good", "/good"))
    error, outputs = await asyncio.gather(bad, good, return_exceptions=True)
    assert isinstance(error, RequestError)
    assert error.status == status
    assert "bad" in str(error)
    assert outputs[-1].outputs[0].text == "hello"


async def test_closing_the_iterator_aborts_in_the_core(engine):
    async with aclosing(engine.generate("long", LONG)) as outputs:
        await anext(outputs)
    assert engine.num_open_requests == 0
    stats = await wait_until_idle(engine)
    assert stats["num_aborted"] == 1


async def test_cancelling_the_task_aborts_all_completions_in_the_core(engine):
    task = asyncio.create_task(run(engine, "long", SamplingParams(n=4, max_tokens=1000)))
    while (await engine.stats())["num_running"] < 4:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await wait_until_idle(engine))["num_aborted"] == 4


async def test_abort_by_id_ends_the_iterator(engine):
    outputs = engine.generate("long", LONG, request_id="mine")
    await anext(outputs)
    await engine.abort("mine")
    await engine.abort("unknown")
    rest = [output async for output in outputs]
    assert rest[-1].finished
    assert rest[-1].outputs[0].finish_reason == "abort"


async def test_a_request_id_in_use_is_refused_and_the_first_goes_on(engine):
    async with aclosing(engine.generate("long", LONG, request_id="mine")) as outputs:
        await anext(outputs)
        with pytest.raises(ValueError, match="request_id='mine'"):
            await run(engine, "hello", request_id="mine")
        await anext(outputs)


async def test_a_slow_reader_gets_the_latest_and_misses_no_text(engine):
    outputs = engine.generate("long", SamplingParams(max_tokens=300))
    await anext(outputs)
    await wait_until_idle(engine)
    texts = [output.outputs[0].text async for output in outputs]
    assert len(texts) < 5, "states in between are left out"
    assert texts[-1] == ("abcdefghijklmnopqrstuvwxyz" * 12)[:300]


@pytest.mark.parametrize(
    ("prompt", "message"), [("crash", "RuntimeError: the fake .* bus"), ("die", "signal 9")]
)
async def test_a_dead_core_fails_all_requests_at_once(engine, prompt, message):
    others = [asyncio.create_task(run(engine, "long")) for _ in range(8)]
    while (await engine.stats())["num_running"] < 8:
        await asyncio.sleep(0.01)
    # Beyond max_num_seqs, so that it is waiting as well.
    results = await asyncio.wait_for(
        asyncio.gather(run(engine, prompt), *others, return_exceptions=True), timeout=2
    )
    assert all(isinstance(result, EngineDeadError) for result in results)
    with pytest.raises(EngineDeadError, match=message):
        await engine.check_health()
    with pytest.raises(EngineDeadError, match=message):
        await run(engine, "hello")
    with pytest.raises(EngineDeadError, match=message):
        await engine.stats()
    assert engine.errored


async def test_shutdown_fails_open_requests(engine):
    task = asyncio.create_task(run(engine, "long"))
    while (await engine.stats())["num_running"] < 1:
        await asyncio.sleep(0.01)
    await engine.shutdown()
    with pytest.raises(EngineDeadError, match="shut down"):
        await task
    await engine.shutdown()


async def test_signals_of_the_group_do_not_end_the_core(engine):
    (process,) = core_processes()
    for number in (signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
    assert (await run(engine, "hello"))[-1].outputs[0].text == "hello"


async def test_a_core_that_does_not_end_is_killed(engine, monkeypatch):
    monkeypatch.setattr("loraplex.engine.async_engine.SHUTDOWN_WAIT", 0.2)
    (process,) = core_processes()
    process.suspend()
    await asyncio.wait_for(engine.shutdown(), timeout=2)


@pytest.mark.parametrize(
    ("factory", "kind", "message"),
    [
        ("refuse_config", ValueError, "^pool_bytes=1 is not allowed: it must be more$"),
        ("break_at_start", EngineDeadError, "could not start: OSError: no such accelerator"),
    ],
)
async def test_an_error_at_the_start_reaches_the_caller(
    tmp_path, monkeypatch, factory, kind, message
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    engine = AsyncEngine(EngineConfig(), f"fake_core:{factory}", ByteTokenizer())
    with pytest.raises(kind, match=message):
        await engine.start()
    with pytest.raises(EngineDeadError):
        await engine.check_health()
    await engine.shutdown()
    assert_nothing_left(tmp_path)


async def test_a_cancelled_start_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    engine = AsyncEngine(EngineConfig(), "fake_core:never_start", ByteTokenizer())
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(engine.start(), timeout=0.5)
    assert_nothing_left(tmp_path)


ORPHAN = """
import asyncio, os, signal, sys
from fakes import ByteTokenizer
from loraplex.engine.async_engine import AsyncEngine
from loraplex.engine.config import EngineConfig

async def main():
    engine = AsyncEngine(EngineConfig(), "fake_core:make_core", ByteTokenizer())
    await engine.start()
    print("started", flush=True)
    await asyncio.sleep(3600)

asyncio.run(main())
"""


async def test_the_core_ends_with_its_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(ORPHAN)
    sockets = tmp_path / "sockets"
    sockets.mkdir()
    support = Path(__file__).parents[1] / "support"
    environment = {**os.environ, "PYTHONPATH": str(support), "TMPDIR": str(sockets)}
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, str(script)), env=environment, stdout=asyncio.subprocess.PIPE
    )
    assert await parent.stdout.readline() == b"started\n"
    children = psutil.Process(parent.pid).children(recursive=True)
    assert len(list(sockets.iterdir())) == 1
    parent.kill()
    await parent.wait()
    wait_until_gone(children)
    deadline = time.monotonic() + 5
    while list(sockets.iterdir()) and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    assert list(sockets.iterdir()) == []


UNGUARDED = """
import asyncio, pathlib, sys
sys.path += [pathlib.Path("ignored"), sys.argv[1]]
from fakes import ByteTokenizer
from loraplex.engine.async_engine import AsyncEngine
from loraplex.engine.config import EngineConfig
from loraplex.engine.sampling_params import SamplingParams

async def main():
    engine = AsyncEngine(EngineConfig(), "fake_core:make_core", ByteTokenizer())
    await engine.start()
    async for output in engine.generate("hello", SamplingParams(), stream=False):
        print(output.outputs[0].text)
    await engine.shutdown()

print("once")
asyncio.run(main())
"""


async def test_a_script_needs_no_guard(tmp_path):
    """The engine process is no second run of it, and finds the modules that it finds."""
    script = tmp_path / "script.py"
    script.write_text(UNGUARDED)
    support = Path(__file__).parents[1] / "support"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(script), str(support)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert output.decode().split() == ["once", "hello"]
    assert process.returncode == 0
