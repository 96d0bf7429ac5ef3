"""Memory for adapter images and for the files they are read from.

Memory that is new to a process costs more than what adapters do with it: the system hands it out
page by page, zeroed, while threads of the same process wait for each other, and a CUDA device has
to be told of every page. So what nobody refers to any more is used again.
"""

from __future__ import annotations

import mmap
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import torch

# Of less, large pages are mostly zeroed in vain, and taken apart when a neighbour is given back.
LARGE_BYTES = 8 << 20

Allocate = Callable[[int], torch.Tensor]
"""Gives uint8 [num_bytes], which nothing else is in; what it holds is anything."""


def allocate_pages(num_bytes: int) -> torch.Tensor:
    """New memory; much of it in large pages, which are read faster, where the system has them."""
    return torch.frombuffer(_map(num_bytes), dtype=torch.uint8)


class PageMemory:
    """Keeps some regions of memory that were given back, for the next that asks for such a size.

    Thread-safe. A region is given back when the last tensor that has a part of it is gone.
    """

    def __init__(
        self,
        max_spare: int,
        max_excess: int = 1,
        prepare: Callable[[mmap.mmap], None] = lambda region: None,
        release: Callable[[mmap.mmap], None] = lambda region: None,
    ) -> None:
        """max_spare: regions to keep. max_excess: a region of so many times the size will do, too.
        prepare and release: what new regions need, and those that
        are about to go."""
        self._max_spare = max_spare
        self._max_excess = max_excess
        self._prepare = prepare
        self._release = release
        # Never locked: a region may be given back at any time, also by a thread that is in here.
        self._spare: deque[mmap.mmap] = deque()
        finalizer = weakref.finalize(self, _release_all, self._spare, release)
        # By the time the program ends, the driver has forgotten what was pinned.
        finalizer.atexit = False

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """As Allocate says."""
        size = _size_class(num_bytes)
        region = self._find(size)
        if region is None:
            region = _map(size)
            self._prepare(region)
        # The tensor's memory refers to this view, and nothing else does.
        view = memoryview(region)[:num_bytes]
        weakref.finalize(view, self._give_back, region).atexit = False
        return torch.frombuffer(view, dtype=torch.uint8)

    def _find(self, size: int) -> mmap.mmap | None:
        """A spare region that will do. If there is none, another one goes: sizes that nobody asks
        for any more must not fill the place of others."""
        with suppress(IndexError):  # another thread was faster
            for _ in range(len(self._spare)):
                region = self._spare.popleft()
                if size <= len(region) <= self._max_excess * size:
                    return region
                self._spare.append(region)
            if len(self._spare) == self._max_spare:
                self._release(self._spare.popleft())
        return None

    def _give_back(self, region: mmap.mmap) -> None:
        if len(self._spare) < self._max_spare:
            self._spare.append(region)
        else:
            self._release(region)


def _map(num_bytes: int) -> mmap.mmap:
    # Shared memory, which is mmap's default, costs twice as much, and is never in large pages.
    region = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if num_bytes >= LARGE_BYTES:
        with suppress(OSError):
            region.madvise(mmap.MADV_HUGEPAGE)
    return region


def _size_class(num_bytes: int) -> int:
    """num_bytes, or up to an eighth more: adapters of one kind differ by what their headers say."""
    step = max(mmap.PAGESIZE, 1 << max(0, num_bytes.bit_length() - 4))
    return max(1, -(-num_bytes // step)) * step


def memory_for_images(max_spare: int) -> PageMemory:
    """Locked where there is a CUDA device, whose copies of it then run by themselves."""
    if torch.cuda.is_available():
        return PageMemory(max_spare, prepare=_pin, release=_unpin)
    return PageMemory(max_spare)


def _address(region: mmap.mmap) -> int:
    return torch.frombuffer(region, dtype=torch.uint8).data_ptr()


def _pin(region: mmap.mmap) -> None:
    # Touched by several threads at once, pages come faster than where the driver asks for them.
    np.frombuffer(region, np.uint8)[:: mmap.PAGESIZE] = 0
    error = torch.cuda.cudart().cudaHostRegister(_address(region), len(region), 0)
    torch.cuda.check_error(int(error))


def _unpin(region: mmap.mmap) -> None:
    torch.cuda.cudart().cudaHostUnregister(_address(region))


def _release_all(spare: deque[mmap.mmap], release: Callable[[mmap.mmap], None]) -> None:
    while spare:
        release(spare.popleft())
