"""Directories that Loraplex makes once and keeps, e.g. of models in other formats."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path


def cache_root() -> Path:
    """Where Loraplex keeps what it can make again: $LORAPLEX_CACHE, or ~/.cache/loraplex."""
    chosen = os.environ.get("LORAPLEX_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "loraplex"


def cached_model(name: str, make: Callable[[Path], None]) -> Path:
    """The model directory of this name in the cache; made now, by filling an empty one, if it is
    not there yet.

    It appears whole or not at all, and processes that want it at the same time wait for the one
    that makes it.
    """
    root = cache_root() / "models"
    target = root / name
    if target.is_dir():
        return target
    root.mkdir(parents=True, exist_ok=True)
    with (root / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            # Whoever holds the lock owns this name: what is there was left by a killed process.
            partial = root / f".{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            make(partial)
            partial.rename(target)
    return target
