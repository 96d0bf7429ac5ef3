"""What HTTP costs: the real server, engine process and scheduler around a device without a model.

Many streams at once, as fast as they go: tokens a second, the server process's CPU time for each,
and its memory before and after. Then requests whose clients leave at random moments: what they held
must be free again.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

import numpy as np
import psutil
import uvloop

from loraplex.benchmarks.completion_client import Call, Record, send_all
from loraplex.benchmarks.host_step import NullDevice
from loraplex.benchmarks.results import milliseconds, write_result
from loraplex.engine.config import EngineConfig
from loraplex.engine.core import EngineCore
from loraplex.engine.messages import ModelInfo
from loraplex.engine.models.locate import locate_model
from loraplex.engine.step import FinishedStep, StepBatch, StepResult

MODULE = "loraplex.benchmarks.server_load"  # also where this is __main__
MODEL = EngineConfig.model
TEXT = "One base model stays in memory, and every request of a batch may use another adapter. "
MAX_MODEL_LEN = 4096
IDLE_METRICS = ("num_requests_running", "num_requests_waiting", 'pages{state="kv"}',
                'pages{state="adapter"}')  # fmt: skip
# Clients at a time in the second part.
NUM_CLIENTS = 200


class TextRunner:
    """Says TEXT over and over, at once."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._token_ids = np.array(token_ids)

    def launch(self, batch: StepBatch) -> FinishedStep:
        positions = batch.seq_lens[batch.sampled] % len(self._token_ids)
        return FinishedStep(StepResult(self._token_ids[positions].tolist(), None, []))


class TextDevice(NullDevice):
    def __init__(self) -> None:
        super().__init__()
        from loraplex.engine.text.tokenizer import load_tokenizer

        path = str(locate_model(MODEL))
        tokenizer = load_tokenizer(path)
        self.runner = TextRunner(tokenizer.encode(TEXT))
        self.model_info = ModelInfo(
            model_name="text",
            tokenizer_path=path,
            max_model_len=MAX_MODEL_LEN,
            vocab_size=tokenizer.vocab_size,
            eos_token_ids=tokenizer.eos_token_ids,
            dtype="float32",
            device="cpu",
        )


def make_core(config: EngineConfig) -> EngineCore:
    return EngineCore(config, lambda config, wake: TextDevice())


def serve(max_num_seqs: int, log_level: str) -> None:
    """The server's process."""
    import logging

    from loraplex.engine.async_engine import AsyncEngine
    from loraplex.engine.core_process import LOG_FORMAT
    from loraplex.entrypoints.http.server_config import ServerConfig
    from loraplex.entrypoints.server import run_server

    logging.basicConfig(level=log_level, format=LOG_FORMAT)
    config = EngineConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=max(8192, max_num_seqs))
    engine = AsyncEngine(config, f"{MODULE}:make_core")
    run_server(engine, ServerConfig(port=0, access_log=False))


@contextmanager
def running(max_num_seqs: int) -> Iterator[tuple[psutil.Process, str]]:
    """A server's process, and its URL."""
    code = f"from {MODULE} import serve; serve({max_num_seqs}, 'INFO')"
    server = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        for line in server.stderr:
            if found := re.search(r"Serving on (http://\S+)", line):
                break
        else:
            raise RuntimeError("the server did not start")
        # The line is written just before connections are taken.
        while not answers(found[1]):
            time.sleep(0.02)
        yield psutil.Process(server.pid), found[1]
    finally:
        server.terminate()
        server.communicate()


def answers(url: str) -> bool:
    try:
        return urlopen(f"{url}/health").status == 200
    except URLError:
        return False


def read_metrics(url: str) -> dict[str, float]:
    """The server's own metrics, by name and labels."""
    text = urlopen(f"{url}/metrics").read().decode()
    found = re.findall(r"^loraplex_(\S+) (\S+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in found}


def wait_until_idle(url: str, timeout: float = 30.0) -> float:
    """Seconds until no request runs and no page is in use. Raises RuntimeError."""
    start = time.perf_counter()
    while True:
        metrics = read_metrics(url)
        if not any(metrics[name] for name in IDLE_METRICS):
            return time.perf_counter() - start
        if time.perf_counter() - start > timeout:
            busy = {name: metrics[name] for name in IDLE_METRICS}
            raise RuntimeError(f"the server does not come to rest: {busy}")
        time.sleep(0.05)


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def measure_streams(process: psutil.Process, url: str, num_streams: int, num_tokens: int) -> Any:
    """Figures of one round of streams that all begin at once."""
    (engine,) = process.children()
    before = cpu_seconds(process), cpu_seconds(engine)
    calls = [Call("text", [1 + i % 1000] * 16, num_tokens) for i in range(num_streams)]
    records, seconds = uvloop.run(send_all(url, calls, timeout=600))
    after = cpu_seconds(process), cpu_seconds(engine)
    wait_until_idle(url)
    check(records, num_tokens)
    total = num_streams * num_tokens
    return {
        "num_streams": num_streams,
        "num_tokens": num_tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(total / seconds),
        "events_per_second": round(sum(len(r.token_times) for r in records) / seconds),
        "server_cpu_us_per_token": round(1e6 * (after[0] - before[0]) / total, 1),
        "engine_cpu_us_per_token": round(1e6 * (after[1] - before[1]) / total, 1),
        "ttft_ms": milliseconds([r.ttft for r in records if r.ttft is not None]),
        "rss_mib": round(process.memory_info().rss / 2**20, 1),
    }


def check(records: Sequence[Record], num_tokens: int) -> None:
    """Raises RuntimeError unless every stream came whole."""
    errors = {record.error for record in records if record.error is not None}
    if errors or any(record.num_output_tokens != num_tokens for record in records):
        raise RuntimeError(f"streams failed: {sorted(errors)}")


async def cancel_at_random(url: str, num_requests: int) -> None:
    """Requests, of which two thirds are left at random moments."""
    rng = random.Random(0)
    address = urlsplit(url)
    slots = asyncio.Semaphore(NUM_CLIENTS)

    async def ask(num_bytes: int | None) -> None:
        body = Call("text", [1 + rng.randrange(1000)] * rng.randrange(1, 64), 50).body()
        async with slots:
            reader, writer = await asyncio.open_connection(address.hostname, address.port)
            try:
                writer.write(
                    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                    b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
                )
                writer.write(body)
                if num_bytes is None:
                    await reader.read(-1)
                else:
                    await asyncio.wait_for(reader.readexactly(num_bytes), rng.uniform(0, 0.2))
            except (TimeoutError, asyncio.IncompleteReadError, ConnectionError):
                pass
            finally:
                writer.transport.abort()

    sizes = [None if i % 3 == 0 else rng.randrange(8000) for i in range(num_requests)]
    async with asyncio.TaskGroup() as group:
        for size in sizes:
            group.create_task(ask(size))


def measure_cancels(process: psutil.Process, url: str, num_requests: int) -> Any:
    before = read_metrics(url)
    start = time.perf_counter()
    uvloop.run(cancel_at_random(url, num_requests))
    seconds = time.perf_counter() - start
    idle_seconds = wait_until_idle(url)
    after = read_metrics(url)
    aborted = 'request_success_total{finished_reason="abort"}'
    free = [sum(m[f'pages{{state="{s}"}}'] for s in ("free", "kv_cached")) for m in (before, after)]
    return {
        "num_requests": num_requests,
        "num_cancelled": round(after[aborted] - before.get(aborted, 0)),
        "seconds": round(seconds, 2),
        "seconds_to_idle": round(idle_seconds, 3),
        "pages_not_in_use_before": free[0],
        "pages_not_in_use_after": free[1],
        "open_files": process.num_fds(),
        "rss_mib": round(process.memory_info().rss / 2**20, 1),
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    with running(options.num_streams) as (process, url):
        idle = round(process.memory_info().rss / 2**20, 1)
        files = process.num_fds()
        rounds = [
            measure_streams(process, url, options.num_streams, options.num_tokens)
            for _ in range(options.num_rounds)
        ]
        cancels = measure_cancels(process, url, options.num_cancels)
        return {
            "rss_mib_at_start": idle,
            "open_files_at_start": files,
            "streams": rounds,
            "cancels": cancels,
        }


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.splitlines()[0])
    parser.add_argument("--num-streams", type=int, default=1000, metavar="N")
    parser.add_argument("--num-tokens", type=int, default=100, metavar="N", help="Of each stream.")
    parser.add_argument("--num-rounds", type=int, default=4, metavar="N")
    parser.add_argument("--num-cancels", type=int, default=10_000, metavar="N")
    parser.add_argument("--output", type=Path, help="JSON file to write.")
    options = parser.parse_args(argv)
    figures = run(options)
    for figure in (*figures["streams"], figures["cancels"]):
        print(figure)
    write_result("server_load", figures, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
