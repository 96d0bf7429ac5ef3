"""The real server, in processes of its own."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import httpx

from loraplex import EngineConfig


@contextmanager
def serving(
    adapter_paths: Mapping[str, str], *flags: str, model: str = EngineConfig.model
) -> Iterator[str]:
    """URL of a server with these adapters, in float32; it must end cleanly when asked to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    modules = [f"{name}={path}" for name, path in adapter_paths.items()]
    if modules:
        flags = (*flags, "--lora-modules", *modules)
    process = subprocess.Popen(
        [sys.executable, "-m", "loraplex.entrypoints.cli", "serve", model,
         "--dtype", "float32", "--max-model-len", "512", "--port", str(port),
         *flags]
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_healthy(url, process)
        yield url
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()


def _wait_until_healthy(url: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise AssertionError(f"the server is not healthy; exit code {process.poll()}")
