"""Host memory for weights on their way to another layout, which is given to one after the other.

Most of the time of a load goes into pages that are touched for the first time. loraplex.lora has
memory that is used again, too, but of a bounded number of regions for as long as the engine runs:
that policy, with as few first touches, would keep 0.4 GiB for nobody while the head of Llama-3-8B
is loaded, where this keeps nothing that is smaller.
"""

from __future__ import annotations

import mmap
import weakref

import numpy as np
import torch


class ReusedMemory:
    """What a tensor had is for others when the tensor is gone; what is left goes with this."""

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []
        self._largest = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor in host memory, of any values."""
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        memory = self._take(num_bytes)
        data = np.frombuffer(memory, np.uint8, num_bytes)
        # The tensor keeps the array, and nobody else does.
        weakref.finalize(data, self._free.append, memory).atexit = False
        return torch.from_numpy(data).view(dtype).view(shape)

    def _take(self, num_bytes: int) -> mmap.mmap:
        if num_bytes > self._largest:
            # The large ones come last, and what was enough before them is in their way: what of it
            # is in use comes back to a list that is gone.
            self._largest, self._free = num_bytes, []
        fitting = [memory for memory in self._free if len(memory) >= num_bytes]
        if not fitting:
            return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory = min(fitting, key=len)
        self._free.remove(memory)
        return memory
