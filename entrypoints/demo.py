"""`loraplex demo`: one server, one wave of requests to the base model and every demo adapter.

It starts the real server as a process of its own and talks to it over HTTP like any client; it
knows the server's routes and metrics and nothing of the engine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any

import httpx
from rich.console import Console
from rich.table import Table
from rich.text import Text

from loraplex.engine.models.embedded import EMBEDDED_MODEL
from loraplex.entrypoints.config_arguments import parse_size

MAX_TOKENS = 64
MAX_MODEL_LEN = 1024
START_TIMEOUT = 300.0
STOP_TIMEOUT = 30.0
MAX_GLYPHS = 1024

# State of a page in loraplex_pages: what it is called, its glyph and its colour.
PAGE_STATES = {
    "adapter": ("adapter in use", "●", "magenta"),
    "adapter_idle": ("adapter idle", "○", "yellow"),
    "kv": ("KV in use", "■", "green"),
    "kv_cached": ("KV cached", "□", "cyan"),
    "free": ("free", "·", "bright_black"),
}


@dataclass(frozen=True)
class Question:
    """One request of the wave."""

    model: str
    prompt: str


@dataclass(frozen=True)
class Reply:
    """What came back for a question; with `error`, the rest is what came before it."""

    question: Question
    text: str = ""
    num_tokens: int = 0
    first_token_seconds: float = 0.0
    total_seconds: float = 0.0
    error: str | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """Speed after the first token; None where there was only one."""
        seconds = self.total_seconds - self.first_token_seconds
        return (self.num_tokens - 1) / seconds if self.num_tokens > 1 and seconds > 0 else None


@dataclass(frozen=True)
class Wave:
    """All replies in the order of their questions, and the pool's pages by state."""

    replies: list[Reply]
    seconds: float
    busiest_pages: dict[str, int]
    final_pages: dict[str, int]


def add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default=EMBEDDED_MODEL, help="Base model of the adapters (default: %(default)s)."
    )
    parser.add_argument(
        "--adapters",
        type=Path,
        default=Path("examples/adapters"),
        help="Directory with one adapter per subdirectory, and prompts.json (default: %(default)s, "
        "as in a checkout of the repository).",
    )
    parser.add_argument(
        "--pool-bytes",
        type=parse_size,
        metavar="SIZE",
        default=64 << 20,
        help="Bytes of the page pool, small enough to make a map (default: 64M).",
    )


def run_demo(args: argparse.Namespace) -> int:
    """Runs the demo: 0 if every reply came and the server stopped as it should, else 1.

    Raises ValueError if there are no adapters where `args.adapters` says, and RuntimeError if the
    server does not start.
    """
    adapters = find_adapters(args.adapters)
    prompts = json.loads((args.adapters / "prompts.json").read_text(encoding="utf-8"))
    console = Console()
    port = _free_port()
    command = serve_command(args.model, port, args.pool_bytes, adapters)
    with _server(command, console) as (process, log):
        url = f"http://127.0.0.1:{port}"
        with console.status("Starting the server and loading the model ..."):
            _wait_until_healthy(url, process, log)
        wave = asyncio.run(_ask_server(url, list(adapters), prompts))
    print_wave(console, wave)
    failed = sum(reply.error is not None for reply in wave.replies)
    if failed:
        console.print(f"{failed} of {len(wave.replies)} replies failed", style="bold red")
    if process.returncode != 0:
        console.print(f"The server ended with exit code {process.returncode}", style="bold red")
    return 1 if failed or process.returncode != 0 else 0


def find_adapters(directory: Path) -> dict[str, Path]:
    """The adapters in the subdirectories of `directory`, by name.

    Raises ValueError if there are none, or no prompts for them.
    """
    configs = sorted(directory.glob("*/adapter_config.json"))
    if not configs or not (directory / "prompts.json").is_file():
        raise ValueError(
            f"--adapters {directory} is not allowed: it must be a directory with adapters in its "
            "subdirectories and a prompts.json, like examples/adapters of the repository"
        )
    return {config.parent.name: config.parent for config in configs}


def make_questions(base_model: str, adapters: list[str], prompts: dict[str, Any]) -> list[Question]:
    """The question for everyone to all, the base model first; then each adapter's own."""
    models = [base_model, *adapters]
    shared = [Question(model, prompts["everyone"]) for model in models]
    own = [Question(a, prompts["adapters"][a]) for a in adapters if a in prompts["adapters"]]
    return shared + own


# The server.


def serve_command(model: str, port: int, pool_bytes: int, adapters: dict[str, Path]) -> list[str]:
    return [
        *(sys.executable, "-m", "loraplex.entrypoints.cli", "serve", model),
        *("--host", "127.0.0.1", "--port", str(port), "--pool-bytes", str(pool_bytes)),
        *("--max-model-len", str(MAX_MODEL_LEN)),
        *("--lora-modules", *(f"{name}={path}" for name, path in adapters.items())),
    ]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def _server(
    command: list[str], console: Console
) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """The running server and its log; it has ended when this is left."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield process, log
        finally:
            with console.status("Stopping the server ..."):
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(STOP_TIMEOUT)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            if process.returncode != 0:
                console.print(_tail(log), style="dim", markup=False, highlight=False)


def _tail(log: IO[bytes]) -> str:
    log.seek(0)
    lines = log.read().decode(errors="replace").splitlines()
    return "\n".join(["The end of the server's log:", *lines[-30:]])


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended at once, with exit code {process.returncode}")
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"the server was not ready after {START_TIMEOUT:.0f} s\n{_tail(log)}")


# The wave.


async def _ask_server(url: str, adapters: list[str], prompts: dict[str, Any]) -> Wave:
    # No limit on connections: the wave is as wide as the demo has questions.
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        served = (await client.get("/v1/models")).raise_for_status().json()["data"]
        base_model = next(model["id"] for model in served if model["id"] not in adapters)
        return await send_wave(client, make_questions(base_model, adapters, prompts))


async def send_wave(client: httpx.AsyncClient, questions: list[Question]) -> Wave:
    """Asks all questions at the same time and watches the pool meanwhile."""
    snapshots: list[dict[str, int]] = []

    async def watch() -> None:
        while True:
            snapshots.append(await read_pages(client))
            await asyncio.sleep(0.1)

    started = time.monotonic()
    watcher = asyncio.create_task(watch())
    replies = await asyncio.gather(*(ask(client, question) for question in questions))
    seconds = time.monotonic() - started
    watcher.cancel()
    await asyncio.gather(watcher, return_exceptions=True)
    final_pages = await read_pages(client)
    snapshots.append(final_pages)
    busiest = max(snapshots, key=lambda pages: pages.get("kv", 0) + pages.get("adapter", 0))
    return Wave(list(replies), seconds, busiest, final_pages)


async def ask(client: httpx.AsyncClient, question: Question) -> Reply:
    """Streams one greedy chat completion."""
    body = {
        "model": question.model,
        "messages": [{"role": "user", "content": question.prompt}],
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    text, num_tokens, first, finish_reason, error = "", 0, 0.0, None, None
    started = last = time.monotonic()
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                message = (await response.aread()).decode(errors="replace")
                return Reply(question, error=f"HTTP {response.status_code}: {message}")
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    error = str(event["error"])
                for choice in event.get("choices", []):
                    finish_reason = choice.get("finish_reason") or finish_reason
                    piece = choice["delta"].get("content") or ""
                    if piece:
                        last = time.monotonic()
                        first = first or last
                        text += piece
                num_tokens = (event.get("usage") or {}).get("completion_tokens", num_tokens)
    except (httpx.HTTPError, ValueError) as exception:
        error = f"{type(exception).__name__}: {exception}"
    if error is None and (not text or finish_reason not in ("stop", "length")):
        error = f"the reply ended early (finish_reason={finish_reason!r}, {len(text)} characters)"
    return Reply(question, text, num_tokens, (first or last) - started, last - started, error)


async def read_pages(client: httpx.AsyncClient) -> dict[str, int]:
    """How many pages of the pool are in which state, from GET /metrics."""
    metrics = (await client.get("/metrics")).raise_for_status().text
    found = re.findall(r'^loraplex_pages\{state="(\w+)"\} (\S+)$', metrics, re.MULTILINE)
    return {state: int(float(count)) for state, count in found}


# What is shown.


def print_wave(console: Console, wave: Wave) -> None:
    table = Table(title="One wave of requests to one base model", expand=True)
    table.add_column("adapter", style="bold", no_wrap=True)
    table.add_column("prompt", style="dim", ratio=2)
    table.add_column("reply", ratio=5)
    table.add_column("first token", justify="right", no_wrap=True)
    table.add_column("tokens/s", justify="right", no_wrap=True)
    shared_prompt = wave.replies[0].question.prompt
    for reply, following in zip_longest(wave.replies, wave.replies[1:]):
        prompt = reply.question.prompt
        ends_shared = prompt == shared_prompt and (
            following is None or following.question.prompt != shared_prompt
        )
        speed = reply.tokens_per_second
        table.add_row(
            Text(reply.question.model),
            Text(prompt),
            Text(reply.text) if reply.error is None else Text(reply.error, style="red"),
            f"{reply.first_token_seconds * 1000:.0f} ms" if reply.text else "",
            "" if speed is None else f"{speed:.0f}",
            end_section=ends_shared,
        )
    console.print(table)
    tokens = sum(reply.num_tokens for reply in wave.replies)
    models = len({reply.question.model for reply in wave.replies})
    console.print(
        f"{len(wave.replies)} replies of {models} models at once: {tokens} tokens in "
        f"{wave.seconds:.1f} s, {tokens / wave.seconds:.0f} tokens/s",
        style="bold",
        highlight=False,
    )
    console.print()
    print_pages(console, "The pool at the busiest moment of the wave", wave.busiest_pages)
    print_pages(console, "The pool afterwards", wave.final_pages)


def print_pages(console: Console, title: str, pages: dict[str, int]) -> None:
    """The pool as a map with a glyph per page (or per few, in a large pool), grouped by state."""
    total = sum(pages.values())
    scale = -(-total // MAX_GLYPHS) or 1
    unit = "one sign is a page" if scale == 1 else f"one sign is {scale} pages"
    console.print(f"{title}: {total} pages, {unit}", style="bold", highlight=False)
    glyphs = Text()
    legend = Text()
    for state, (label, glyph, colour) in PAGE_STATES.items():
        count = pages.get(state, 0)
        glyphs.append(glyph * -(-count // scale), style=colour)
        legend.append(f"{glyph} {label} {count}   ", style=colour)
    width = min(console.width, 64)
    for start in range(0, len(glyphs), width):
        console.print(glyphs[start : start + width])
    console.print(legend)
    console.print()
