"""A `fake_server` in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil

FAKE_SERVER = Path(__file__).with_name("fake_server.py")
ADDRESS = re.compile(r"Serving on (http://\S+)")


class ServerProcess:
    """A server that started. `log` is all it wrote so far."""

    def __init__(self, process: subprocess.Popen, log_file: Path, socket_root: Path) -> None:
        self.process = process
        self.socket_root = socket_root
        self._log_file = log_file
        # One client for all: making one takes longer than most requests.
        self._http = httpx.Client()
        self.url = wait_for_server(log_file, process, 60, self._http)

    @property
    def log(self) -> str:
        return self._log_file.read_text()

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def metric(self, name: str) -> float:
        """The value of a metric, written with its labels; 0.0 if it is not there."""
        text = self._http.get(f"{self.url}/metrics").text
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def wait_for_metric(self, name: str, value: float, timeout: float = 5.0) -> None:
        deadline = time.monotonic() + timeout
        while (last := self.metric(name)) != value:
            assert time.monotonic() < deadline, f"{name} is {last} and not {value}"
            time.sleep(0.02)

    def stop(self, number: int = signal.SIGTERM, timeout: float = 10.0) -> int:
        """Signal the server and return its exit status; nothing of it may be left."""
        descendants = self.descendants()
        self.process.send_signal(number)
        status = self.process.wait(timeout)
        wait_until_gone(descendants)
        assert list(self.socket_root.iterdir()) == [], "no socket is left"
        return status


def wait_for_server(
    log_file: Path, process: subprocess.Popen, timeout: float, http: httpx.Client
) -> str:
    """The URL of a server that took a free port, once it says so and is healthy."""
    deadline = time.monotonic() + timeout
    while True:
        log = log_file.read_text()
        assert process.poll() is None and time.monotonic() < deadline, log
        if (found := ADDRESS.search(log)) is not None and _is_healthy(found[1], http):
            return found[1]
        time.sleep(0.02)


def _is_healthy(url: str, http: httpx.Client) -> bool:
    try:
        return http.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def wait_until_gone(processes: list[psutil.Process], timeout: float = 5.0) -> None:
    """Wait until the processes have ended. A container's init may take its time to reap them."""
    deadline = time.monotonic() + timeout
    while alive := [process for process in processes if _is_alive(process)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.01)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def popen_server(*flags: str, directory: Path, **variables: str) -> subprocess.Popen:
    """The process only, which may be on its way to an error; it logs to directory/log."""
    (directory / "sockets").mkdir()
    with (directory / "log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, str(FAKE_SERVER), "--port", "0", *flags],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(directory / "sockets"), **variables},
        )


@contextmanager
def running_server(*flags: str, **variables: str) -> Iterator[ServerProcess]:
    """A server with these flags and environment variables, which ends with the block."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        process = popen_server(*flags, directory=directory, **variables)
        try:
            yield ServerProcess(process, directory / "log", directory / "sockets")
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
