"""Adapters on disk: whole or not there, under a byte budget, never removed while they are read.

    CACHE/entries/KEY/   files, .manifest.json (made last), .lock (shared: read; exclusive: removed)
    CACHE/partial/KEY/   files and parts of files, .lock (exclusive: being downloaded)
    CACHE/aliases/KEY    the identity that a source last had for a name
    CACHE/trash/         on its way out

All that is known is in these directories, so that restarts lose nothing and processes may share
them. An entry is as old as its lock file says, which every lease touches.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from loraplex.lora.sources.file_lock import POLL_SECONDS, FileLock, try_lock, wait_for_lock
from loraplex.lora.sources.listing import Identity

LOCK = ".lock"
MANIFEST = ".manifest.json"


@dataclass(frozen=True)
class Lease:
    """An entry that stays while this is open."""

    directory: Path
    num_bytes: int
    lock: FileLock

    def share(self) -> Lease:
        """Another lease on the same entry."""
        return Lease(self.directory, self.num_bytes, self.lock.share())

    def close(self) -> None:
        self.lock.close()


class DiskCache:
    """Directories by identity. Thread-safe, and several processes may share its directory."""

    def __init__(self, directory: Path, capacity_bytes: int) -> None:
        """capacity_bytes: for entries and what is left of interrupted downloads. What is being
        read or downloaded stays even if it is more. The directory is made when it is needed."""
        self._directory = directory
        self._capacity_bytes = capacity_bytes
        self._is_prepared = False

    def lease(self, identity: Identity) -> Lease | None:
        """The entry, if it is there and whole."""
        directory = self._directory / "entries" / _key(identity)
        try:
            lock = wait_for_lock(directory / LOCK, shared=True)
        except FileNotFoundError:
            return None
        num_bytes = _checked_bytes(directory)
        if num_bytes is None:
            lock.close()
            self._remove(directory)
            return None
        os.utime(directory / LOCK)
        return Lease(directory, num_bytes, lock)

    def fill(
        self,
        identity: Identity,
        num_bytes: int,
        write: Callable[[Path], None],
        on_wait: Callable[[], object],
    ) -> Lease:
        """The entry, which `write` makes in the directory it is given, if nobody else does.

        What an interrupted `write` has left there is what the next finds. num_bytes: what room to
        make for it. on_wait is called again and again while another makes it, and may raise.
        """
        self._prepare()
        key = _key(identity)
        partial, entry = self._directory / "partial" / key, self._directory / "entries" / key
        while True:
            lease = self.lease(identity)
            if lease is not None:
                return lease
            with suppress(FileExistsError):  # Another began, and may have ended by now.
                partial.mkdir(mode=0o700)
            try:
                lock = wait_for_lock(partial / LOCK, on_wait=on_wait)
            except FileNotFoundError:  # Another has made it an entry, or removed it.
                continue
            with lock:
                if entry.exists():
                    # Made meanwhile; or broken and in use, in which case it goes when it can.
                    self._discard(partial)
                    on_wait()
                    time.sleep(POLL_SECONDS)
                    continue
                os.utime(partial / LOCK)
                self.make_room(num_bytes - _num_bytes(partial))
                write(partial)
                _write_manifest(partial, identity)
                partial.rename(entry)
                lock.make_shared()
                # Another lease, as this lock closes here.
                lease = self.lease(identity)
            if lease is not None:
                self.make_room(0)
                return lease

    def make_room(self, num_bytes: int) -> None:
        """Remove what was least recently used until so many bytes more fit, or all is in use."""
        self._prepare()
        with wait_for_lock(self._directory / LOCK):
            found = sorted(
                (_last_used(path), path, _num_bytes(path))
                for name in ("entries", "partial")
                for path in (self._directory / name).iterdir()
            )
            excess = sum(size for _, _, size in found) + num_bytes - self._capacity_bytes
            for _, path, size in found:
                if excess <= 0:
                    return
                if self._remove(path):
                    excess -= size

    def num_bytes(self) -> int:
        """Bytes on disk, with what is being downloaded."""
        paths = [p for n in ("entries", "partial") for p in (self._directory / n).glob("*")]
        return sum(map(_num_bytes, paths))

    def remove(self, identity: Identity) -> bool:
        """Whether an entry is not there any more; it stays while somebody reads it."""
        return self._remove(self._directory / "entries" / _key(identity))

    def remember(self, alias: Identity, identity: Identity) -> None:
        """Note that the alias means this identity now."""
        self._prepare()
        path = self._directory / "aliases" / _key(alias)
        temporary = self._directory / "trash" / uuid.uuid4().hex
        temporary.write_text(json.dumps(identity))
        temporary.replace(path)

    def recall(self, alias: Identity) -> Identity | None:
        """What the alias meant when it was last remembered, if that is here."""
        try:
            identity = tuple(json.loads((self._directory / "aliases" / _key(alias)).read_text()))
        except (FileNotFoundError, ValueError):
            return None
        return identity if (self._directory / "entries" / _key(identity)).exists() else None

    def _prepare(self) -> None:
        """Make the directories, every time: others may remove them."""
        for name in ("entries", "partial", "aliases", "trash"):
            # Private adapters are nobody else's business.
            (self._directory / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        if not self._is_prepared:
            for leftover in (self._directory / "trash").iterdir():
                shutil.rmtree(leftover, ignore_errors=True)
        self._is_prepared = True

    def _remove(self, path: Path) -> bool:
        """Whether a directory is gone now; not, if somebody reads or writes it."""
        try:
            lock = try_lock(path / LOCK)
            if lock is None:
                return False
            with lock:
                self._discard(path)
        except FileNotFoundError:  # Another has removed it.
            pass
        return True

    def _discard(self, path: Path) -> None:
        """Remove a directory whose lock is held: at once for all others, who may be at its door."""
        trash = self._directory / "trash" / uuid.uuid4().hex
        path.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


def _key(identity: Identity) -> str:
    """A directory name that a human recognises and no other identity has."""
    digest = blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest()
    hint = re.sub("[^A-Za-z0-9.]+", "-", "-".join(identity[:1] + identity[2:]))
    return f"{hint[:80].strip('.-')}-{digest}"


def _num_bytes(directory: Path) -> int:
    """Of what is there; files may come and go meanwhile."""
    num_bytes = 0
    with suppress(FileNotFoundError):
        for name in os.listdir(directory):
            with suppress(FileNotFoundError):
                num_bytes += os.stat(directory / name).st_size
    return num_bytes


def _last_used(directory: Path) -> int:
    try:
        return (directory / LOCK).stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _write_manifest(directory: Path, identity: Identity) -> None:
    files = {path.name: path.stat().st_size for path in directory.iterdir() if path.name != LOCK}
    text = json.dumps({"identity": identity, "files": files}, indent=1)
    with open(directory / MANIFEST, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _checked_bytes(directory: Path) -> int | None:
    """Bytes of an entry's files; None if some are missing or have another size."""
    try:
        files = json.loads((directory / MANIFEST).read_bytes())["files"]
        if any((directory / name).stat().st_size != size for name, size in files.items()):
            return None
    except (OSError, ValueError):
        return None
    return sum(files.values())
