"""Adapter images in host memory, read and copied by threads of their own so that nobody waits.

Knows nothing of requests, pages or sources: an adapter is an opaque key and a way to have its
files, and what calls the store decides when to copy where.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from threading import Lock
from typing import Protocol

import torch

from loraplex.lora.adapter_form import AdapterForms
from loraplex.lora.held_images import HeldImage, HeldImages
from loraplex.lora.image import AdapterImage
from loraplex.lora.loader import load_adapter
from loraplex.lora.page_memory import PageMemory, memory_for_images
from loraplex.lora.recipe import Recipe
from loraplex.lora.spec import AdapterError, BaseModelSpec

logger = logging.getLogger(__name__)


class AdapterFiles(Protocol):
    """Files that stay where they are until this is closed."""

    @property
    def recipe(self) -> Recipe: ...

    def close(self) -> None: ...


OpenFiles = Callable[[], Future[AdapterFiles]]
"""Begins to bring an adapter's files here; AdapterError, in the future, if that can't be."""


@dataclass(slots=True)
class _Failure:
    error: AdapterError
    retry_at: float
    is_reported: bool = False
    """Once at least, however late who asked asks again."""


class HostAdapterStore:
    """Reads adapters on request and keeps their images, least recently used first to go.

    Thread-safe. A key is read once however many ask for it. Images are dropped only inside `get`
    of a key that is not there, so that one caller's image stays until its next such question.
    """

    def __init__(
        self,
        spec: BaseModelSpec,
        page_bytes: int,
        dtype: torch.dtype,
        capacity_bytes: int,
        num_threads: int = 4,
        on_change: Callable[[], None] = lambda: None,
        retry_seconds: float = 5.0,
        await_seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """capacity_bytes: as in HeldImages.

        num_threads: readers. More than a few read less: they wait for the process's page tables.

        on_change is called, by any thread, when files have come and when a read or a copy has
        ended.
        retry_seconds: how long a failure is reported, before the next `get` reads again.
        await_seconds: how long an image that nobody copies is kept for those who asked for it.
        """
        self._spec = spec
        self._page_bytes = page_bytes
        self._dtype = dtype
        self._num_threads = num_threads
        self._on_change = on_change
        self._retry_seconds = retry_seconds
        self._await_seconds = await_seconds
        self._clock = clock
        self._lock = Lock()
        self._held = HeldImages(capacity_bytes, clock)
        self._failures: OrderedDict[Hashable, _Failure] = OrderedDict()
        self._asked_at: dict[Hashable, float] = {}  # Of those that are not there yet.
        self._opening: set[Hashable] = set()
        self._queue: OrderedDict[Hashable, AdapterFiles] = OrderedDict()
        self._reading: set[Hashable] = set()
        self._unwanted: set[Hashable] = set()  # Of those that are opened or read now.
        self._num_loads = self._num_failures = 0
        self._load_seconds = 0.0
        self._is_closed = False
        self._copy_stream: torch.cuda.Stream | None = None
        # Images that make room for others leave them their memory.
        self._image_memory = memory_for_images(2 * num_threads)
        self._file_memory = PageMemory(num_threads, max_excess=16)
        self._forms = AdapterForms(spec)
        self._readers = ThreadPoolExecutor(num_threads, "adapter-reader")
        # Apart from the readers, so that what is ready never waits for what is not.
        self._copiers = ThreadPoolExecutor(1, "adapter-copier")

    def get(self, key: Hashable, open_files: OpenFiles) -> AdapterImage | None:
        """The image; None while it is being read, which this begins where nobody has yet.

        Raises AdapterError if it could not be read, for retry_seconds after that.
        """
        with self._lock:
            held = self._held.use(key)
            if held is not None:
                return held.image
            self._forget_old_failures()
            failure = self._failures.get(key)
            if failure is not None:
                if not failure.is_reported or self._clock() < failure.retry_at:
                    failure.is_reported = True
                    raise type(failure.error)(str(failure.error), failure.error.status)
                del self._failures[key]
            self._unwanted.discard(key)
            is_under_way = key in self._opening or key in self._queue or key in self._reading
            if is_under_way or self._is_closed:
                if self._can_read() and not self._has_room():
                    self._held.make_room(len(self._reading))
                self._start_reads()
                return None
            self._opening.add(key)
            self._asked_at[key] = self._clock()
        open_files().add_done_callback(partial(self._take_files, key))
        return None

    def drop(self, key: Hashable) -> None:
        """Give an image up, also one that is being read. A copy that is under way goes on."""
        with self._lock:
            if key in self._opening or key in self._reading:
                self._unwanted.add(key)
            queued = self._queue.pop(key, None)
            if queued is not None:
                queued.close()
                del self._asked_at[key]
            self._held.drop(key)
            self._start_reads()

    def pin(self, key: Hashable) -> None:
        """Keep the image of a key that is in host memory until `unpin`, or `drop`.

        Raises AdapterError if there is no room for that.
        """
        with self._lock:
            self._held.pin(key)

    def unpin(self, key: Hashable) -> None:
        """The image may be dropped again, if it is there."""
        with self._lock:
            self._held.unpin(key)

    def image(self, key: Hashable) -> AdapterImage:
        """The image of a key that is in host memory."""
        with self._lock:
            return self._held[key].image

    def copy_to_pages(
        self,
        key: Hashable,
        memory: torch.Tensor,
        pages: Sequence[int],
        after_stream: bool = True,
        before_stream: bool = True,
    ) -> Future[None]:
        """Begin to copy an image that is in host memory: its page i goes to memory[pages[i]].

        memory: uint8 [num_pages, page_bytes], on any device. The future ends with the copy. On a
        CUDA device it begins behind what the current stream has been given so far, if after_stream,
        and the stream goes on with what it is given later behind the copy, if before_stream.
        """
        with self._lock:
            held = self._held[key]
            assert len(pages) == held.image.num_pages
            held.num_copies += 1
        if memory.is_cuda:
            copied = self._enqueue_copy(held, memory, list(pages), after_stream)
            if before_stream:
                copied.wait()
            copy = copied.synchronize
        else:
            copy = partial(_copy_pages, held.image.pages, memory, list(pages))
        return self._copiers.submit(self._copy, held, copy)

    def _enqueue_copy(
        self, held: HeldImage, memory: torch.Tensor, pages: list[int], after_stream: bool
    ) -> torch.cuda.Event:
        """The event of its end."""
        if self._copy_stream is None:
            self._copy_stream = torch.cuda.Stream(memory.device)
        if after_stream:
            self._copy_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._copy_stream):
            _copy_pages(held.image.pages, memory, pages)
            copied = torch.cuda.Event()
            copied.record()
        return copied

    def stats(self) -> dict[str, float]:
        """Images, reads and their times so far, in bytes and seconds."""
        with self._lock:
            return {
                "images": len(self._held),
                "bytes": self._held.num_bytes,
                "reading": len(self._opening) + len(self._queue) + len(self._reading),
                "loads": self._num_loads,
                "failures": self._num_failures,
                "drops": self._held.num_drops,
                "load_seconds": self._load_seconds,
            }

    def holds(self, key: Hashable) -> bool:
        """Whether a key is in host memory."""
        with self._lock:
            return key in self._held

    def read_interval(self, key: Hashable) -> tuple[float, float]:
        """When a key that is in host memory was asked for, and was there, by the clock."""
        with self._lock:
            return self._held[key].read_interval

    def load_seconds(self, key: Hashable) -> float:
        """How long reading and packing took, of a key that is in host memory."""
        with self._lock:
            return self._held[key].load_seconds

    def close(self) -> None:
        """End the threads, and wait for what they are at."""
        with self._lock:
            self._is_closed = True
            while self._queue:
                key, files = self._queue.popitem()
                files.close()
                del self._asked_at[key]
        self._readers.shutdown()
        self._copiers.shutdown()

    def check_integrity(self) -> None:
        """The books agree with each other."""
        with self._lock:
            self._held.check_integrity()
            assert len(self._reading) <= self._num_threads
            keys = [*self._held, *self._failures, *self._opening, *self._queue, *self._reading]
            assert len(keys) == len(set(keys)), "a key is in one state"
            assert self._unwanted <= self._opening | self._reading
            assert self._asked_at.keys() == {*self._opening, *self._queue, *self._reading}

    # -- with the lock held ----------------------------------------------------------------

    def _can_read(self) -> bool:
        has_thread = len(self._reading) < self._num_threads and not self._is_closed
        return has_thread and bool(self._queue)

    def _start_reads(self) -> None:
        """Read what waits, as threads and memory allow: one larger than all memory on its own."""
        while self._can_read() and (self._has_room() or self._is_alone()):
            key, files = self._queue.popitem(last=False)
            self._reading.add(key)
            self._readers.submit(self._read, key, files)

    def _is_alone(self) -> bool:
        """Whether nothing is there, or to come, that could make room by and by."""
        return not self._reading and self._held.are_all_pinned()

    def _has_room(self) -> bool:
        return self._held.have_room(len(self._reading))

    def _is_wanted(self, key: Hashable) -> bool:
        """Whether a key that is not opened or read any more was not dropped meanwhile."""
        is_unwanted = key in self._unwanted
        self._unwanted.discard(key)
        is_wanted = not is_unwanted and not self._is_closed
        if not is_wanted:
            self._asked_at.pop(key, None)
        return is_wanted

    def _fail(self, key: Hashable, error: AdapterError) -> None:
        self._asked_at.pop(key, None)
        self._failures[key] = _Failure(error, self._clock() + self._retry_seconds)
        self._num_failures += 1

    def _forget_old_failures(self) -> None:
        now = self._clock()
        while self._failures:
            key, failure = next(iter(self._failures.items()))
            if failure.retry_at + self._await_seconds > now:
                return
            del self._failures[key]

    # -- in the threads --------------------------------------------------------------------

    def _take_files(self, key: Hashable, opened: Future[AdapterFiles]) -> None:
        """The files are here, or can't be: called by whoever brought them."""
        with self._lock:
            self._opening.discard(key)
            error = opened.exception()
            is_wanted = self._is_wanted(key)
            if isinstance(error, AdapterError):
                if is_wanted:
                    self._fail(key, error)
            elif is_wanted:
                self._queue[key] = opened.result()
                self._start_reads()
            else:
                opened.result().close()
        self._on_change()

    def _read(self, key: Hashable, files: AdapterFiles) -> None:
        start = self._clock()
        outcome: AdapterImage | AdapterError
        try:
            outcome = load_adapter(
                files.recipe,
                self._spec,
                self._page_bytes,
                self._dtype,
                self._image_memory.allocate,
                self._file_memory.allocate,
                self._forms.read,
            )
        except AdapterError as error:
            outcome = error
        except Exception as error:
            logger.exception("reading adapter %s failed", files.recipe)
            outcome = AdapterError(
                f"adapter {files.recipe!r} could not be read: {error!r}", status=500
            )
        files.close()
        end = self._clock()
        with self._lock:
            self._reading.discard(key)
            if not self._is_wanted(key):
                pass
            elif isinstance(outcome, AdapterImage):
                interval = self._asked_at.pop(key, start), end
                awaited_until = end + self._await_seconds
                self._held.add(key, HeldImage(outcome, end - start, interval, awaited_until))
                self._num_loads += 1
                self._load_seconds += end - start
            else:
                self._fail(key, outcome)
            self._start_reads()
        self._on_change()

    def _copy(self, held: HeldImage, copy: Callable[[], None]) -> None:
        """Copy, or wait for the device to."""
        try:
            copy()
        finally:
            with self._lock:
                self._held.end_copy(held)
                self._start_reads()
        self._on_change()


def _copy_pages(source: torch.Tensor, memory: torch.Tensor, pages: list[int]) -> None:
    """memory[pages[i]] = source[i], a copy per run of adjacent pages."""
    breaks = [i for i in range(1, len(pages)) if pages[i] != pages[i - 1] + 1]
    for start, end in pairwise([0, *breaks, len(pages)]):
        target = memory[pages[start] : pages[start] + end - start]
        if target.device.type == "cpu":
            # numpy copies in this thread; torch would use OpenMP threads, which fight with those
            # of the model's forward pass.
            target.numpy()[:] = source[start:end].numpy()
        else:
            target.copy_(source[start:end], non_blocking=True)
