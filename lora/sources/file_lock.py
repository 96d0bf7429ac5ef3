"""Locks on files, shared or exclusive, between threads and processes alike."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

POLL_SECONDS = 0.02


class FileLock:
    """A lock on a file; held until it is closed, or its process ends.

    (`flock` itself, as the filelock package's locks can't be shared by several readers.)
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def share(self) -> FileLock:
        """Another handle of the same lock, which is held until all of them are closed."""
        return FileLock(os.dup(self._descriptor))

    def make_shared(self) -> None:
        """Let others share it from now on. It may be lost in between: see `is_of`."""
        fcntl.flock(self._descriptor, fcntl.LOCK_SH)

    def is_of(self, path: Path) -> bool:
        """Whether the file that is locked is the one at this path."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(path))
        except FileNotFoundError:
            return False

    @property
    def is_open(self) -> bool:
        return self._descriptor >= 0

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def try_lock(path: Path, shared: bool = False) -> FileLock | None:
    """The lock on the file at this path, which is made if missing; None if another has it.

    Raises FileNotFoundError if its directory is missing, or goes away meanwhile.
    """
    lock = FileLock(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    try:
        fcntl.flock(lock._descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    if not lock.is_of(path):
        lock.close()
        raise FileNotFoundError(f"{path} went away")
    return lock


def wait_for_lock(
    path: Path, shared: bool = False, on_wait: Callable[[], object] = lambda: None
) -> FileLock:
    """As `try_lock`, but waits; on_wait is called again and again meanwhile, and may raise."""
    while (lock := try_lock(path, shared)) is None:
        on_wait()
        time.sleep(POLL_SECONDS)
    return lock
