"""`loraplex run-batch`: a file of OpenAI requests to a file of their answers, without a server.

The format is that of OpenAI's batch API: a line for each request with custom_id, method, url and
body, and a line for each answer with custom_id, response and error.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import httpx
from tqdm import tqdm

from loraplex.engine.core_process import LOG_FORMAT
from loraplex.entrypoints.config_arguments import (
    add_config_arguments,
    add_engine_arguments,
    config_from_arguments,
    engine_config_from_arguments,
)
from loraplex.entrypoints.http.server_config import ServerConfig

if TYPE_CHECKING:
    from loraplex.engine.async_engine import AsyncEngine

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
SERVER_OPTIONS = (
    "lora_modules", "served_model_name", "tool_call_parser", "reasoning_parser",
    "trust_request_chat_template",
)  # fmt: skip
# Requests that are handed to the engine at once: enough for any batch it runs.
MAX_NUM_OPEN = 1024


def add_run_batch_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("batch")
    group.add_argument("-i", "--input-file", required=True, help="JSON Lines; - is standard input.")
    group.add_argument("-o", "--output-file", required=True, help="- is standard output.")
    others = [f.name for f in fields(ServerConfig) if f.name not in SERVER_OPTIONS]
    add_config_arguments(parser, ServerConfig, "server", leave_out=others)
    add_engine_arguments(parser)


def run_run_batch(arguments: argparse.Namespace) -> int:
    """Answer all requests; one that fails has its error in its line.

    Raises ValueError for a file that is no batch, before the model is loaded; EngineDeadError.
    """
    engine_config = engine_config_from_arguments(arguments)
    server_config = config_from_arguments(arguments, ServerConfig)
    requests = read_batch(arguments.input_file)
    logging.basicConfig(level=logging.WARNING, format=LOG_FORMAT)
    # Imported late, so that --help and a mistake in the file take no second.
    from loraplex.engine.async_engine import AsyncEngine

    with _open_output(arguments.output_file) as output:
        asyncio.run(answer_batch(AsyncEngine(engine_config), server_config, requests, output))
    return 0


def read_batch(name: str) -> list[dict[str, Any]]:
    """The requests in a file. Raises ValueError, naming the line."""
    return list(_read(name))


def _read(name: str) -> Iterator[dict[str, Any]]:
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text()
    except OSError as error:
        raise ValueError(f"input_file={name!r} can't be read: {error}") from error
    seen: set[str] = set()
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield _check_line(line, f"line {number} of {name}", seen)


def _check_line(line: str, place: str, seen: set[str]) -> dict[str, Any]:
    """The request in a line. Raises ValueError, naming the place."""
    try:
        request = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place} is no JSON: {error}") from error
    if not isinstance(request, dict):
        raise ValueError(f"{place} is no JSON object")
    custom_id, url, body = (request.get(name) for name in ("custom_id", "url", "body"))
    if not isinstance(custom_id, str) or custom_id in seen:
        raise ValueError(f"{place}: custom_id={custom_id!r} must be a string of its own")
    seen.add(custom_id)
    if request.get("method", "POST") != "POST":
        raise ValueError(f"{place}: method={request['method']!r} must be 'POST'")
    if url not in URLS:
        raise ValueError(f"{place}: url={url!r} must be one of {', '.join(URLS)}")
    if not isinstance(body, dict) or body.get("stream"):
        raise ValueError(f"{place}: body must be a JSON object without stream=true")
    return request


@asynccontextmanager
async def _client(engine: AsyncEngine, config: ServerConfig) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server's application without the server: no sockets are between them."""
    from loraplex.entrypoints.app import build_app
    from loraplex.entrypoints.server import adapters_of, make_serving

    adapters = adapters_of(config)
    try:
        await engine.start()
        app = build_app(make_serving(engine, config, adapters), config, keys=None)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://batch", timeout=None
        ) as client:
            yield client
    finally:
        await engine.shutdown()


async def answer_batch(
    engine: AsyncEngine, config: ServerConfig, requests: list[dict[str, Any]], output: TextIO
) -> None:
    """Write a line for each request, as they are answered. The engine is started and ended."""
    may_open = asyncio.Semaphore(MAX_NUM_OPEN)
    async with _client(engine, config) as client:

        async def answer(request: dict[str, Any]) -> str:
            async with may_open:
                response = await client.post(request["url"], json=request["body"])
            return json.dumps(_answer_line(request["custom_id"], response))

        tasks = [asyncio.ensure_future(answer(request)) for request in requests]
        for task in tqdm(asyncio.as_completed(tasks), total=len(tasks), unit=" requests"):
            output.write(await task + "\n")
            output.flush()


def _answer_line(custom_id: str, response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    return {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": custom_id,
        "response": {
            "status_code": response.status_code,
            "request_id": response.headers.get("x-request-id", ""),
            "body": body,
        },
        "error": None if response.is_success else body.get("error"),
    }


def _open_output(name: str) -> TextIO:
    if name == "-":
        return sys.stdout
    try:
        return Path(name).open("w")
    except OSError as error:
        raise ValueError(f"output_file={name!r} can't be written: {error}") from error
