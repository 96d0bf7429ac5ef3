"""Times calls on a CUDA device, on memory that its cache does not hold. Knows no cases."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from statistics import median

import torch

from loraplex.benchmarks.kernel_cases import Call, FigureTable

Tensor = torch.Tensor
DTYPE = torch.bfloat16
ALIGNMENT = 128
PRODUCT_SIZE = 8192


class Memory:
    """One allocation full of random numbers, which cases cut into tensors, one after another."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._elements = torch.empty(num_bytes // DTYPE.itemsize, dtype=DTYPE, device=device)
        self._elements.normal_(0.0, 0.02)
        self.used = 0
        """Elements taken. Set it back, and what was taken since may be taken again."""

    @property
    def free_bytes(self) -> int:
        return (len(self._elements) - self.used) * DTYPE.itemsize

    def take(self, *sizes: int) -> Tensor:
        """A tensor of what is left. Raises RuntimeError if that is too little."""
        size = torch.Size(sizes).numel()
        begin, self.used = self.used, self.used + -(-size // ALIGNMENT) * ALIGNMENT
        if self.used > len(self._elements):
            raise RuntimeError(f"the case takes more memory than {self._elements.nbytes} bytes")
        return self._elements[begin : begin + size].view(sizes)


class GpuBench:
    """Times calls, and holds them against the device's ceilings, which it measures first."""

    def __init__(
        self,
        memory: Memory,
        device: torch.device,
        repetitions: int,
        product_size: int = PRODUCT_SIZE,
    ) -> None:
        """product_size: rows and columns of the matrices whose product is the ceiling."""
        self.memory, self.device = memory, device
        self._repetitions, self._product_size = repetitions, product_size
        self.table = FigureTable(self.measure_copying(), self.measure_products())
        self.launch_seconds = self.measure_launching()

    def seconds(self, calls: Sequence[Call]) -> float:
        """Of each of the calls, in a graph of all of them."""
        for call in calls[:2]:
            call()  # Libraries make their handles and compile at the first call.
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(self._repetitions + 1)]
        # The replay before is still running, so that no time between events is the host's.
        events[0].record()
        for event in events[1:]:
            graph.replay()
            event.record()
        torch.cuda.synchronize()
        times = [begin.elapsed_time(end) for begin, end in pairwise(events)]
        return median(times) / 1e3 / len(calls)

    def measure_copying(self) -> float:
        self.memory.used = 0
        source, target = self.memory.take(2, self.memory.free_bytes // 8 // DTYPE.itemsize)
        return 2 * source.nbytes / self.seconds([partial(target.copy_, source)] * 4)

    def measure_products(self) -> float:
        self.memory.used = 0
        size = self._product_size
        a, b, out = self.memory.take(3, size, size)
        return 2 * size**3 / self.seconds([partial(torch.mm, a, b, out=out)] * 4)

    def measure_launching(self) -> float:
        """What a kernel costs in a graph that does next to nothing."""
        return self.seconds([partial(torch.zeros(1, device=self.device).add_, 1)] * 1000)

    def add(self, case: str, calls: Sequence[Call], num_bytes: float, flops: float) -> None:
        """Bytes and flops are each call's."""
        self.table.add(case, self.seconds(calls), num_bytes, flops)
