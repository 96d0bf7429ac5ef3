"""The host store: one read however many ask, a byte budget, and failures that pass."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

import pytest
import torch

from loraplex.benchmarks.synthetic_adapters import llama_spec, write_adapter
from loraplex.lora import host_store
from loraplex.lora.host_store import HostAdapterStore, OpenFiles
from loraplex.lora.image import AdapterImage
from loraplex.lora.loader import load_adapter
from loraplex.lora.spec import AdapterChanged, AdapterError

SPEC = llama_spec()
PAGE_BYTES = 4 * 1024
DTYPE = torch.bfloat16


@contextmanager
def make_store(capacity_bytes: int = 1 << 30, **options) -> Iterator[HostAdapterStore]:
    store = HostAdapterStore(SPEC, PAGE_BYTES, DTYPE, capacity_bytes, **options)
    try:
        yield store
        store.check_integrity()
    finally:
        store.close()


class Files:
    """A directory, and whether it was closed."""

    def __init__(self, path: str) -> None:
        self.recipe = path
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


def files_of(path: str) -> OpenFiles:
    """Files that are there already."""

    def open_files() -> Future[Files]:
        future: Future[Files] = Future()
        future.set_result(Files(path))
        return future

    return open_files


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to pass"
        time.sleep(0.001)


def get_when_ready(store: HostAdapterStore, key: str, path: str) -> AdapterImage:
    wait_until(lambda: store.get(key, files_of(path)) is not None)
    return store.image(key)


class Gate:
    """Holds reads up in load_adapter until it is opened, and counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        self.paths: list[str] = []
        self.failing = False

        def gated(path, *args):
            self.paths.append(str(path))
            assert self.opened.wait(20)
            if self.failing:
                raise AdapterError("out of order")
            return load_adapter(path, *args)

        monkeypatch.setattr(host_store, "load_adapter", gated)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.opened.set()


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("adapters")
    return [str(write_adapter(root / str(i), SPEC, rank=8, seed=i)) for i in range(6)]


@pytest.fixture(scope="module")
def image_bytes(paths: list[str]) -> int:
    return load_adapter(paths[0], SPEC, PAGE_BYTES, DTYPE).num_bytes


def test_nobody_waits_and_the_image_is_the_adapters(paths, gate):
    with make_store() as store:
        # Who waited for the gate would fail.
        assert store.get("a", files_of(paths[0])) is None
        assert store.get("a", files_of(paths[0])) is None
        gate.opened.set()
        image = get_when_ready(store, "a", paths[0])
        expected = load_adapter(paths[0], SPEC, PAGE_BYTES, DTYPE)
        assert torch.equal(image.buffer, expected.buffer)
        assert store.load_seconds("a") > 0
        stats = store.stats()
        assert (stats["images"], stats["loads"], stats["reading"]) == (1, 1, 0)
        assert stats["bytes"] == image.num_bytes
        assert stats["load_seconds"] == store.load_seconds("a")


def test_500_concurrent_requests_are_one_read(paths, gate):
    with make_store() as store:
        barrier = threading.Barrier(50)
        images: list[AdapterImage] = []

        def ask() -> None:
            barrier.wait()
            for _ in range(10):
                store.get("a", files_of(paths[0]))
            images.append(get_when_ready(store, "a", paths[0]))

        threads = [threading.Thread(target=ask) for _ in range(50)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(gate.paths) > 0)
        gate.opened.set()
        for thread in threads:
            thread.join()
        assert gate.paths == [paths[0]]
        assert len(images) == 50
        assert len({id(image) for image in images}) == 1


def test_reads_run_at_once_up_to_the_threads(paths, gate):
    with make_store(num_threads=3) as store:
        for path in paths:
            assert store.get(path, files_of(path)) is None
        wait_until(lambda: len(gate.paths) == 3)
        store.check_integrity()
        assert store.stats()["reading"] == 6
        gate.opened.set()
        wait_until(lambda: store.stats()["images"] == 6)
        assert gate.paths == paths, "in the order in which they were asked for"


def test_changes_wake_the_engine(paths):
    wakes = threading.Semaphore(0)
    with make_store(on_change=wakes.release) as store:
        while (image := store.get("a", files_of(paths[0]))) is None:
            assert wakes.acquire(timeout=20)
        memory = torch.zeros(image.num_pages, PAGE_BYTES, dtype=torch.uint8)
        store.copy_to_pages("a", memory, range(image.num_pages))
        assert wakes.acquire(timeout=20)
        store.get("bad", files_of("/nowhere"))
        assert wakes.acquire(timeout=20)


class Clock:
    """Stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_failures_are_reported_then_forgotten_then_retried(paths, tmp_path):
    path, clock = tmp_path / "later", Clock()
    with make_store(retry_seconds=3.0, clock=clock) as store:
        assert store.get("a", files_of(str(path))) is None
        wait_until(lambda: store.stats()["failures"] == 1)
        clock.now += 2.9
        for _ in range(3):
            with pytest.raises(AdapterError, match="does not exist") as caught:
                store.get("a", files_of(str(path)))
            assert caught.value.status == 404
        write_adapter(path, SPEC)
        clock.now += 0.2
        get_when_ready(store, "a", str(path))
        assert store.stats()["failures"] == 1


def test_a_failure_is_reported_once_however_late_one_asks(paths, tmp_path):
    clock = Clock()
    with make_store(retry_seconds=0.0, await_seconds=5.0, clock=clock) as store:
        assert store.get("a", files_of(str(tmp_path))) is None
        wait_until(lambda: store.stats()["failures"] == 1)
        clock.now += 4.9
        with pytest.raises(AdapterError):
            store.get("a", files_of(str(tmp_path)))
        assert store.get("a", files_of(paths[0])) is None, "which reads again"


def test_files_that_cannot_be_opened_are_a_failure(paths):
    opened: Future[Files] = Future()
    with make_store(clock=Clock()) as store:
        assert store.get("a", lambda: opened) is None
        assert store.get("a", lambda: pytest.fail("opened twice")) is None
        opened.set_exception(AdapterChanged("gone"))
        with pytest.raises(AdapterChanged, match="gone"):
            store.get("a", files_of(paths[0]))
        get_when_ready(store, "b", paths[1])


def test_files_are_closed_when_they_are_read_or_not_wanted(paths, gate):
    read, queued, late = (Files(paths[i]) for i in range(3))
    late_opened: Future[Files] = Future()
    with make_store(num_threads=1) as store:
        for files in (read, queued):
            opened: Future[Files] = Future()
            opened.set_result(files)
            store.get(files, lambda opened=opened: opened)
        store.get(late, lambda: late_opened)
        wait_until(lambda: gate.paths == paths[:1])
        for files in (read, queued, late):
            store.drop(files)
            assert not read.is_closed
        assert queued.is_closed
        late_opened.set_result(late)
        assert late.is_closed
        gate.opened.set()
        wait_until(lambda: read.is_closed and store.stats()["reading"] == 0)
        assert store.stats()["images"] == 0, "what was dropped while it was read is not kept"
        get_when_ready(store, read, paths[0])
        store.drop(read)
        assert store.stats()["bytes"] == 0


def test_what_is_asked_for_again_while_it_is_read_is_kept(paths, gate):
    with make_store() as store:
        store.get("a", files_of(paths[0]))
        wait_until(lambda: gate.paths == paths[:1])
        store.drop("a")
        assert store.get("a", files_of(paths[0])) is None
        gate.opened.set()
        get_when_ready(store, "a", paths[0])
        assert gate.paths == paths[:1]


def test_a_failure_does_not_touch_other_adapters(paths, tmp_path):
    bad = write_adapter(tmp_path, SPEC, use_dora=True)
    with make_store(clock=Clock()) as store:
        assert store.get("bad", files_of(str(bad))) is None
        for path in paths:
            get_when_ready(store, path, path)
        wait_until(lambda: store.stats()["failures"] == 1)
        with pytest.raises(AdapterError, match="use_dora"):
            store.get("bad", files_of(str(bad)))


def test_an_unexpected_error_is_a_failure_too(paths, monkeypatch, caplog):
    def explode(*args):
        raise MemoryError("no more")

    monkeypatch.setattr(host_store, "load_adapter", explode)
    with make_store() as store:
        store.get("a", files_of(paths[0]))
        wait_until(lambda: store.stats()["failures"] == 1)
        with pytest.raises(AdapterError, match="no more") as caught:
            store.get("a", files_of(paths[0]))
        assert caught.value.status == 500
    assert "no more" in caplog.text


def copy(store: HostAdapterStore, key: str) -> None:
    image = store.image(key)
    memory = torch.zeros(image.num_pages, PAGE_BYTES, dtype=torch.uint8)
    store.copy_to_pages(key, memory, range(image.num_pages)).result(20)


def test_the_least_recently_used_image_is_dropped_first(paths, image_bytes):
    with make_store(capacity_bytes=3 * image_bytes, num_threads=1) as store:
        for path in paths[:3]:
            get_when_ready(store, path, path)
            copy(store, path)
        assert store.stats()["drops"] == 0
        store.get(paths[0], files_of(paths[0]))
        get_when_ready(store, paths[3], paths[3])
        assert store.stats()["bytes"] == 3 * image_bytes
        assert store.stats()["drops"] == 1
        for path in (paths[0], paths[2], paths[3]):
            assert store.image(path)
        with pytest.raises(KeyError):
            store.image(paths[1])


def test_a_pinned_image_is_not_dropped_and_starves_nobody(paths, image_bytes):
    with make_store(capacity_bytes=int(1.5 * image_bytes), await_seconds=0.0) as store:
        get_when_ready(store, paths[0], paths[0])
        store.pin(paths[0])
        for path in paths[1:]:
            get_when_ready(store, path, path)
            with pytest.raises(AdapterError, match="no room to pin"):
                store.pin(path)
            copy(store, path)
        assert store.image(paths[0])
        assert store.stats()["bytes"] == 2 * image_bytes
        store.unpin(paths[0])
        get_when_ready(store, paths[1], paths[1])
        store.drop(paths[1])
        get_when_ready(store, paths[2], paths[2])
        assert store.stats()["bytes"] == image_bytes


@pytest.mark.parametrize("capacity", [0, 1, 2.5])
def test_everyone_gets_their_image_in_turn_under_any_budget(paths, image_bytes, capacity):
    """All are polled all the time; each is copied when it is there, as an engine would."""
    with make_store(capacity_bytes=int(capacity * image_bytes), num_threads=1) as store:
        for _ in range(3):
            left = set(paths)
            end = time.monotonic() + 20
            while left:
                assert time.monotonic() < end
                for path in sorted(left):
                    image = store.get(path, files_of(path))
                    assert store.stats()["bytes"] <= max(capacity, 1) * image_bytes
                    if image is not None:
                        copy(store, path)
                        left.discard(path)
                store.check_integrity()
        assert store.stats()["loads"] <= 3 * len(paths), "none was read twice for one copy"


def test_an_image_that_is_awaited_or_copied_is_not_dropped(paths, image_bytes, monkeypatch):
    clock = Clock()
    with make_store(capacity_bytes=0, num_threads=1, await_seconds=4.0, clock=clock) as store:
        get_when_ready(store, "a", paths[0])
        assert store.get("b", files_of(paths[1])) is None
        clock.now += 3.9
        assert store.get("b", files_of(paths[1])) is None, "a is awaited, so b is not even begun"
        assert store.stats()["loads"] == 1
        going, release = threading.Event(), threading.Event()
        original = host_store._copy_pages

        def slow_copy(*args):
            going.set()
            assert release.wait(20)
            original(*args)

        monkeypatch.setattr(host_store, "_copy_pages", slow_copy)
        image = store.image("a")
        memory = torch.zeros(image.num_pages, PAGE_BYTES, dtype=torch.uint8)
        future = store.copy_to_pages("a", memory, range(image.num_pages))
        assert going.wait(20)
        clock.now += 0.2
        assert store.get("b", files_of(paths[1])) is None
        assert store.image("a") is image, "await_seconds are over, but it is being copied"
        release.set()
        future.result(20)
        get_when_ready(store, "b", paths[1])
        assert torch.equal(memory, image.pages)


def test_an_image_that_nobody_fetches_makes_room_in_the_end(paths):
    with make_store(capacity_bytes=0, num_threads=1, await_seconds=0.2) as store:
        get_when_ready(store, "abandoned", paths[0])
        get_when_ready(store, "b", paths[1])
        assert store.stats()["drops"] == 1


@pytest.mark.parametrize(
    "pages",
    [
        lambda n: list(range(1, n + 1)),
        lambda n: list(range(n, 0, -1)),
        lambda n: [2 * i + 1 for i in range(n)],
        lambda n: [1, 2, 5, 6, 7, *range(20, 20 + n - 5)],
    ],
    ids=["one run", "reversed", "scattered", "runs"],
)
def test_copies_go_to_their_pages_and_nowhere_else(paths, pages):
    with make_store() as store:
        image = get_when_ready(store, "a", paths[0])
        assert image.num_pages > 5
        targets = pages(image.num_pages)
        memory = torch.full((80, PAGE_BYTES), 0xAB, dtype=torch.uint8)
        store.copy_to_pages("a", memory, targets).result(20)
        assert torch.equal(memory[targets], image.pages)
        others = [page for page in range(80) if page not in targets]
        assert (memory[others] == 0xAB).all()


def test_close_ends_the_threads_and_what_waits(paths, gate):
    before = set(threading.enumerate())
    store = HostAdapterStore(SPEC, PAGE_BYTES, DTYPE, 1 << 30, num_threads=1)
    for path in paths:
        store.get(path, files_of(path))
    wait_until(lambda: len(gate.paths) == 1)
    gate.opened.set()
    store.close()
    store.check_integrity()
    assert set(threading.enumerate()) <= before
    assert len(gate.paths) <= 2
    assert store.get("new", files_of(paths[0])) is None, "harmless, and nothing starts"
