"""Starts processes of the engine: an interpreter of their own, and a connection to it.

A fork would share the state of threads and of CUDA. Not by multiprocessing, which would run the
user's main module again, so that a script would have to guard itself; and not by -m, which would
give the messages' classes other names.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe


def start_child(
    main: Callable[[Connection], None], **environment: str
) -> tuple[subprocess.Popen[bytes], Connection]:
    """A process that runs `main`, of a module, with the other end of the connection. It is there
    for as long as both processes are, which is what either sees of the other.

    environment: what differs from this process's.
    """
    ours, theirs = Pipe()
    descriptor = theirs.fileno()
    paths = [path for path in sys.path if isinstance(path, str)]  # Python ignores all others.
    code = (
        f"import sys; sys.path[:] = {paths}; from {__name__} import run_child; "
        f"from {main.__module__} import {main.__name__}; run_child({main.__name__}, {descriptor})"
    )
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            pass_fds=[descriptor],
            stdin=subprocess.DEVNULL,
            env={**os.environ, **environment},
        )
    return process, ours


def run_child(main: Callable[[Connection], None], descriptor: int) -> None:
    """All of a child's process."""
    for number in (signal.SIGINT, signal.SIGTERM):
        # Both reach the whole group of processes, and the parent may have work left for this one.
        signal.signal(number, signal.SIG_IGN)
    main(Connection(descriptor))
