"""The real server, in processes of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx
from server_process import wait_for_server

from loraplex import EngineConfig


@contextmanager
def serving(
    adapter_paths: Mapping[str, str], *flags: str, model: str = EngineConfig.model
) -> Iterator[str]:
    """URL of a server with these adapters, in float32; it must end cleanly when asked to."""
    modules = [f"{name}={path}" for name, path in adapter_paths.items()]
    if modules:
        flags = (*flags, "--lora-modules", *modules)
    with tempfile.TemporaryDirectory() as name:
        log_file = Path(name) / "log"
        with log_file.open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "loraplex.entrypoints.cli", "serve", model,
                 "--dtype", "float32", "--max-model-len", "512", "--port", "0", *flags],
                stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        try:
            with httpx.Client() as http:
                url = wait_for_server(log_file, process, 120, http)
            yield url
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=30) == 0
        finally:
            process.kill()
            process.wait()
            sys.stderr.write(log_file.read_text())
