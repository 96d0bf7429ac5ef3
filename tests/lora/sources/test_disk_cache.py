"""The cache on disk: whole entries, a byte budget, leases that hold between processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loraplex.lora.sources import file_lock
from loraplex.lora.sources.disk_cache import DiskCache, Lease

KIB = 1024


def identity(name: str, version: str = "1") -> tuple[str, ...]:
    return ("hub", "http://hub", name, "", version)


def writer(num_bytes: int = KIB) -> Callable[[Path], None]:
    return lambda directory: (directory / "weights").write_bytes(bytes(num_bytes)) and None


def fill(cache: DiskCache, name: str, num_bytes: int = KIB) -> Lease:
    return cache.fill(identity(name), num_bytes, writer(num_bytes), lambda: None)


def names_in(cache: DiskCache, names: str) -> str:
    """Those of these one-letter names that are there; looking does not make them younger."""
    there = ""
    for name in names:
        path = cache._directory / "entries"
        there += name if any(f"hub-{name}-1-" in entry for entry in os.listdir(path)) else ""
    return there


@pytest.fixture
def cache(tmp_path: Path) -> DiskCache:
    # Room for three entries with their manifests.
    return DiskCache(tmp_path / "cache", 4 * KIB)


def test_what_was_filled_is_there(cache: DiskCache):
    assert cache.lease(identity("a")) is None
    lease = fill(cache, "a", 100)
    assert (lease.directory / "weights").read_bytes() == bytes(100)
    assert lease.num_bytes == 100
    assert cache.lease(identity("a", version="2")) is None
    again = cache.lease(identity("a"))
    assert again is not None and again.directory == lease.directory


def test_the_least_recently_used_goes_first(cache: DiskCache):
    for name in "abc":
        fill(cache, name).close()
    lease = cache.lease(identity("a"))
    assert lease is not None
    lease.close()
    fill(cache, "d").close()
    assert names_in(cache, "abcd") == "acd"
    assert cache.num_bytes() <= 4 * KIB
    fill(cache, "e", 2 * KIB).close()
    assert names_in(cache, "abcde") == "de"


def test_room_is_made_before_it_is_needed(cache: DiskCache):
    for name in "abc":
        fill(cache, name).close()

    def write(directory: Path) -> None:
        assert names_in(cache, "abc") == "c"
        writer(2 * KIB)(directory)

    cache.fill(identity("d"), 2 * KIB, write, lambda: None)


def test_what_takes_more_than_was_said_makes_room_afterwards(cache: DiskCache):
    for name in "abc":
        fill(cache, name).close()
    cache.fill(identity("d"), 0, writer(3 * KIB), lambda: None)
    assert names_in(cache, "abcd") == "d"


def test_what_is_read_stays(cache: DiskCache):
    held = fill(cache, "a")
    second = held.share()
    held.close()
    for name in "bcde":
        fill(cache, name).close()
    assert names_in(cache, "abcde") == "ade"
    second.close()
    for name in "fgh":
        fill(cache, name).close()
    assert names_in(cache, "afgh") == "fgh"


def test_a_lease_that_is_forgotten_ends(cache: DiskCache):
    fill(cache, "a")
    for name in "bcd":
        fill(cache, name)
    assert names_in(cache, "abcd") == "bcd"


def test_what_is_larger_than_the_budget_is_there_while_it_is_needed(cache: DiskCache):
    lease = fill(cache, "a", 8 * KIB)
    assert (lease.directory / "weights").stat().st_size == 8 * KIB
    lease.close()
    fill(cache, "b").close()
    assert names_in(cache, "ab") == "b"


def test_a_restart_finds_everything_and_its_order(cache: DiskCache, tmp_path: Path):
    for name in "abc":
        fill(cache, name).close()
    cache.lease(identity("a"))
    again = DiskCache(tmp_path / "cache", 4 * KIB)
    assert names_in(again, "abc") == "abc"
    fill(again, "d").close()
    assert names_in(again, "abcd") == "acd"


def test_what_was_cut_is_found_by_the_next(cache: DiskCache, tmp_path: Path):
    def fail(directory: Path) -> None:
        (directory / "weights.part").write_bytes(b"half")
        raise ConnectionError

    with pytest.raises(ConnectionError):
        cache.fill(identity("a"), KIB, fail, lambda: None)
    assert cache.lease(identity("a")) is None

    def go_on(directory: Path) -> None:
        assert (directory / "weights.part").read_bytes() == b"half"
        (directory / "weights.part").rename(directory / "weights")

    again = DiskCache(tmp_path / "cache", 4 * KIB)
    lease = again.fill(identity("a"), KIB, go_on, lambda: None)
    assert lease.num_bytes == 4
    assert not os.listdir(tmp_path / "cache/partial")


def test_leftovers_make_room_as_entries_do(cache: DiskCache, tmp_path: Path):
    def fail(directory: Path) -> None:
        (directory / "weights.part").write_bytes(bytes(3 * KIB))
        raise ConnectionError

    with pytest.raises(ConnectionError):
        cache.fill(identity("a"), KIB, fail, lambda: None)
    fill(cache, "b", 2 * KIB).close()
    assert not os.listdir(tmp_path / "cache/partial")
    assert names_in(cache, "b") == "b"


@pytest.mark.parametrize("damage", ["missing", "short", "no manifest"])
def test_a_damaged_entry_is_made_anew(cache: DiskCache, damage: str):
    lease = fill(cache, "a")
    directory = lease.directory
    lease.close()
    match damage:
        case "missing":
            (directory / "weights").unlink()
        case "short":
            os.truncate(directory / "weights", 3)
        case _:
            (directory / ".manifest.json").unlink()
    assert cache.lease(identity("a")) is None
    assert (fill(cache, "a").directory / "weights").stat().st_size == KIB


def test_one_writes_however_many_want_it(tmp_path: Path):
    num_writes, started, gate = [], threading.Event(), threading.Event()

    def write(directory: Path) -> None:
        num_writes.append(1)
        started.set()
        assert gate.wait(20)
        writer()(directory)

    def fill_it(_: int) -> Lease:
        # A cache object of its own is as good as a process of its own: flock sees no difference.
        cache = DiskCache(tmp_path / "cache", 4 * KIB)
        return cache.fill(identity("a"), KIB, write, lambda: None)

    with ThreadPoolExecutor(4) as threads:
        leases = [threads.submit(fill_it, i) for i in range(4)]
        assert started.wait(20)
        time.sleep(0.05)
        gate.set()
        assert len({lease.result(20).directory for lease in leases}) == 1
    assert len(num_writes) == 1
    assert not os.listdir(tmp_path / "cache/partial")


def test_what_another_made_meanwhile_is_not_made_again(
    cache: DiskCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made = fill(cache, "a")
    lease, answers = cache.lease, [None]
    monkeypatch.setattr(cache, "lease", lambda i: answers.pop() if answers else lease(i))
    again = cache.fill(identity("a"), KIB, lambda directory: pytest.fail("again"), lambda: None)
    assert again.directory == made.directory
    assert not os.listdir(tmp_path / "cache/partial")


def test_a_lock_on_what_was_replaced_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, flock = tmp_path / "lock", file_lock.fcntl.flock

    def flock_late(descriptor: int, operation: int) -> None:
        path.rename(tmp_path / "moved")
        flock(descriptor, operation)

    monkeypatch.setattr(file_lock.fcntl, "flock", flock_late)
    with pytest.raises(FileNotFoundError):
        file_lock.try_lock(path)


def test_whoever_waits_takes_over_from_one_that_failed(cache: DiskCache):
    started, gate = threading.Event(), threading.Event()

    def fail(directory: Path) -> None:
        started.set()
        assert gate.wait(20)
        raise ConnectionError

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(cache.fill, identity("a"), KIB, fail, lambda: None)
        assert started.wait(20)
        waiting = threading.Event()
        second = threads.submit(cache.fill, identity("a"), KIB, writer(), waiting.set)
        assert waiting.wait(20)
        gate.set()
        assert second.result(20).num_bytes == KIB
        with pytest.raises(ConnectionError):
            first.result(20)


def test_a_waiter_may_lose_patience(cache: DiskCache):
    def impatient() -> None:
        raise TimeoutError

    def write(directory: Path) -> None:
        with pytest.raises(TimeoutError):
            cache.fill(identity("a"), KIB, writer(), impatient)
        writer()(directory)

    cache.fill(identity("a"), KIB, write, lambda: None)


def test_a_lease_holds_against_other_processes(cache: DiskCache, tmp_path: Path):
    fill(cache, "a").close()
    script = f"""
import sys
from pathlib import Path
from loraplex.lora.sources import file_lock
from loraplex.lora.sources.disk_cache import DiskCache
lease = DiskCache(Path({str(tmp_path / "cache")!r}), {4 * KIB}).lease({identity("a")!r})
print("leased", flush=True)
sys.stdin.read(1)
"""
    other = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout is not None and other.stdout.readline() == b"leased\n"
    for name in "bcde":
        fill(cache, name).close()
    assert names_in(cache, "abcde") == "ade"
    other.kill()
    other.communicate()
    for name in "fgh":
        fill(cache, name).close()
    assert names_in(cache, "afgh") == "fgh"


def test_many_at_once_keep_the_budget(tmp_path: Path):
    def use(worker: int) -> None:
        cache = DiskCache(tmp_path / "cache", 4 * KIB)
        for i in range(20):
            lease = fill(cache, f"{(worker + i) % 5}")
            assert (lease.directory / "weights").stat().st_size == KIB
            lease.close()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(use, range(4)))
    cache = DiskCache(tmp_path / "cache", 4 * KIB)
    cache.make_room(0)
    assert cache.num_bytes() <= 4 * KIB
    assert not os.listdir(tmp_path / "cache/trash")


def test_aliases_last_as_long_as_what_they_mean(cache: DiskCache, tmp_path: Path):
    alias = ("alias", "main")
    assert cache.recall(alias) is None
    cache.remember(alias, identity("a"))
    assert cache.recall(alias) is None
    fill(cache, "a").close()
    assert DiskCache(tmp_path / "cache", 4 * KIB).recall(alias) == identity("a")


def test_nobody_else_may_look_inside(cache: DiskCache, tmp_path: Path):
    fill(cache, "a").close()
    assert {path.stat().st_mode & 0o077 for path in (tmp_path / "cache").iterdir()} == {0}
