"""The kernels of a step on a CUDA device against what the device could do: bytes moved, or products
computed. Shapes are Llama-3-8B's, in bfloat16.

Every call of a case has tensors of its own, weights and activations alike, and together they are
several times what the L2 cache holds: each is counted as read from memory once, and is. (Not so
the scratch between shrink and expand, which the layers of a step share, and what torch allocates
for results. In a step small activations lie in the cache, too: kernels may be faster than here.)
The calls are one CUDA graph, replayed back to back between events; the figure is the median
replay's. The ceilings are measured on the same device, in the same run: copying memory, and
cuBLAS's product.

    python benchmarks/gpu_kernels.py [--only lora attention linears rows]
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from loraplex import native
from loraplex.attention.backend import get_backend
from loraplex.benchmarks.gpu_timing import DTYPE, GpuBench, Memory
from loraplex.benchmarks.kernel_cases import (
    GROUPS,
    HEADING,
    AttentionCase,
    Call,
    ModelShape,
    attention_shape,
    group_widths,
    row_operations,
    scatter_images,
    uniform_layout,
)
from loraplex.benchmarks.plots import plot_shares
from loraplex.benchmarks.results import write_result
from loraplex.benchmarks.roofline import adapter_counts
from loraplex.engine.models.streamed_linear import streamed_linear
from loraplex.lora.layers import shrink_scratch
from loraplex.lora.plan import MAX_RANK, plan_items

NOMINAL = {
    "NVIDIA H100 80GB HBM3": (3.35e12, 989e12),
    "NVIDIA H200": (4.8e12, 989e12),
    "NVIDIA A100-SXM4-80GB": (2.04e12, 312e12),
}
"""Bytes and dense bfloat16 products a second that the makers name."""
MEMORY_BYTES = 28 << 30


@dataclass(frozen=True)
class Grid:
    """What is measured; what says most comes first."""

    shape: ModelShape = ModelShape(32, 4096, 14336, 32, 8, 128)
    vocab_size: int = 128_256
    ranks: tuple[int, ...] = (16, 64, 8)
    batches: tuple[int, ...] = (64, 256, 16, 1)
    num_adapters: tuple[int | str, ...] = (16, "batch", 64, 1)
    prefill_rows: int = 2048
    prefill_adapters: tuple[int, ...] = (1, 16)
    decode_contexts: tuple[int, ...] = (512, 2048)
    prefills: tuple[tuple[int, int], ...] = ((1, 2048), (8, 512))
    attention_backend: str = "flashinfer"
    rotated_bytes: int = 256 << 20
    """That the calls of a case touch together, at least, as far as max_calls allows."""
    min_calls: int = 8
    max_calls: int = 4096

    def lora_cases(self) -> Iterable[tuple[int, int, int]]:
        """(rows, distinct adapters, rank)"""
        for rank in self.ranks:
            for batch in self.batches:
                for count in adapter_counts(batch, self.num_adapters):
                    yield batch, count, rank
            for count in self.prefill_adapters:
                yield self.prefill_rows, count, rank

    def num_calls(self, bytes_per_call: float) -> int:
        wanted = -(-self.rotated_bytes // int(bytes_per_call))
        return min(max(wanted, self.min_calls), self.max_calls)


class LoraCase:
    """Rows that go round so many adapters of one rank, which lie in shuffled pages; a call for each
    layer of several such sets of adapters."""

    def __init__(
        self, bench: GpuBench, grid: Grid, rows: int, num_adapters: int, rank: int
    ) -> None:
        self.bench, self.grid, self.rows, self.rank = bench, grid, rows, rank
        self.num_adapters = num_adapters
        memory = bench.memory
        memory.used = 0
        page_bytes = grid.shape.page_bytes(DTYPE.itemsize)
        # A share of the memory is for the base products' weights and for activations.
        most_pages = memory.free_bytes * 3 // 4 // page_bytes // num_adapters
        num_layers = grid.shape.num_layers
        while True:
            self.spec = grid.shape.spec(num_layers)
            layout = uniform_layout(self.spec, rank, page_bytes, DTYPE.itemsize)
            if layout.num_pages <= most_pages or num_layers == 1:
                break
            num_layers //= 2
        smallest = min(self.bytes_of(modules) for modules in GROUPS.values())
        wanted_sets = -(-grid.num_calls(smallest) // num_layers)
        self.num_sets = max(1, min(wanted_sets, most_pages // layout.num_pages))
        num_images = self.num_sets * num_adapters
        pool = memory.take(num_images * layout.num_pages, page_bytes // DTYPE.itemsize)
        self.pool = pool.view(torch.uint8)
        tables = scatter_images(self.pool, layout, num_images).view(self.num_sets, num_adapters, -1)
        per_adapter = np.full(num_adapters, rows // num_adapters)
        indptr = np.concatenate([[0], per_adapter.cumsum()]).astype(np.int32)
        num_pages = np.full(num_adapters, layout.num_pages)
        plans = [plan_items(indptr, table.numpy(), num_pages) for table in tables]
        self.items = torch.from_numpy(plans[0][0]).to(bench.device)
        self.scratch = shrink_scratch(bench.device)
        self.num_items = torch.tensor([len(self.items)], dtype=torch.int32, device=bench.device)
        self.pages = [torch.from_numpy(pages).to(bench.device) for _, pages in plans]
        self.used = memory.used

    def bytes_of(self, modules: list[int]) -> int:
        """That a call cannot do without: the weights, the adapters, x and y."""
        inputs, offsets = group_widths(self.spec, modules)
        outputs, ranks = offsets[-1], self.num_adapters * self.rank
        elements = inputs * outputs + ranks * (inputs * len(modules) + outputs)
        return DTYPE.itemsize * (elements + self.rows * (inputs + outputs))

    def flops_of(self, modules: list[int]) -> float:
        inputs, offsets = group_widths(self.spec, modules)
        outputs = offsets[-1]
        of_adapters = self.rank * (inputs * len(modules) + outputs)
        return 2 * self.rows * (inputs * outputs + of_adapters)

    def calls(self, modules: list[int]) -> list[Call]:
        """The base product with the adapters', on memory that the next calls may take over."""
        self.bench.memory.used = self.used
        bench, num_layers = self.bench, self.spec.num_layers
        inputs, offsets = group_widths(self.spec, modules)
        num_calls = self.grid.num_calls(self.bytes_of(modules))
        num_calls = min(num_calls, self.num_sets * num_layers)
        weights = bench.memory.take(num_calls, offsets[-1], inputs)
        activations = bench.memory.take(num_calls, self.rows, inputs)
        # The scratch is the same for all layers of a step, too.
        v = torch.randn(self.rows, len(modules), MAX_RANK, device=bench.device)
        scratch = self.scratch.partials, self.scratch.flags

        def call(weight: torch.Tensor, x: torch.Tensor, adapters: int, layer: int) -> None:
            y = (streamed_linear(weight) or F.linear)(x, weight, None)
            plan = (
                self.pool, self.items, self.num_items, self.pages[adapters], layer, modules,
                self.spec.num_modules,
            )  # fmt: skip
            native.cuda_lora_shrink(v, x, *scratch, *plan)
            native.cuda_lora_expand(y, v, *plan, offsets)

        return [
            partial(call, weight, x, *divmod(index, num_layers))
            for index, (weight, x) in enumerate(zip(weights, activations, strict=True))
        ]


def bench_lora(bench: GpuBench, grid: Grid) -> Iterator[None]:
    for rows, num_adapters, rank in grid.lora_cases():
        case = LoraCase(bench, grid, rows, num_adapters, rank)
        label = f"B{rows} A{num_adapters} r{rank}"
        totals = np.zeros(3)
        for name, modules in GROUPS.items():
            needs = case.bytes_of(modules), case.flops_of(modules)
            seconds = bench.seconds(case.calls(modules))
            bench.table.add(f"lora {name}: {label}", seconds, *needs)
            totals += seconds, *needs
        bench.table.add(f"lora layer: {label}", *totals.tolist())
        yield


def bench_attention(bench: GpuBench, grid: Grid) -> Iterator[None]:
    memory = bench.memory
    cases = [
        ("decode", AttentionCase(grid.shape, batch, 1, context))
        for context in grid.decode_contexts
        for batch in grid.batches
    ]
    cases += [
        ("prefill", AttentionCase(grid.shape, num_requests, length, length))
        for num_requests, length in grid.prefills
    ]
    shape = attention_shape(
        grid.shape, DTYPE, bench.device, max(case.num_requests for _, case in cases),
        max(case.num_pages for _, case in cases),
    )  # fmt: skip
    try:
        backend = get_backend(grid.attention_backend, shape)
    except ValueError as error:
        print(f"attention is left out: {error}", flush=True)
        return
    print("attention: the first of each kind may be compiled now, which takes a minute", flush=True)
    for kind, case in cases:
        memory.used = 0
        num_bytes = case.elements * DTYPE.itemsize
        num_layers = grid.num_calls(num_bytes)
        pool = memory.take(case.num_pages, num_layers, *case.kv_sizes)
        bench.add(
            f"attention: {kind} {case.num_requests} x {case.context}",
            case.calls(backend, pool, memory.take(num_layers, *case.qkv_sizes)),
            num_bytes,
            case.flops,
        )
        yield


def bench_linears(bench: GpuBench, grid: Grid) -> Iterator[None]:
    """The base model's, as the engine multiplies."""
    memory = bench.memory
    spec = grid.shape.spec(1)
    widths = {name: group_widths(spec, modules) for name, modules in GROUPS.items()}
    sizes = {name: (inputs, offsets[-1]) for name, (inputs, offsets) in widths.items()}
    sizes["lm_head"] = grid.shape.hidden, grid.vocab_size
    for rows in (*grid.batches, grid.prefill_rows):
        for name, (inputs, outputs) in sizes.items():
            if name == "lm_head" and rows == grid.prefill_rows:
                continue  # It sees a row of each request.
            memory.used = 0
            elements = inputs * outputs + rows * (inputs + outputs)
            num_calls = grid.num_calls(elements * DTYPE.itemsize)
            weights = memory.take(num_calls, outputs, inputs)
            activations = memory.take(num_calls, rows, inputs)
            bench.add(
                f"linears: {name}, {rows} rows",
                [
                    partial(streamed_linear(w) or F.linear, x, w, None)
                    for x, w in zip(activations, weights, strict=True)
                ],
                elements * DTYPE.itemsize,
                2 * rows * inputs * outputs,
            )
        yield


def bench_rows(bench: GpuBench, grid: Grid) -> Iterator[None]:
    memory = bench.memory
    for rows in (*grid.batches, grid.prefill_rows):
        memory.used = 0
        operations = row_operations(grid.shape, rows, memory.take, num_kv_pages=1024)
        for name, make, elements in operations:
            num_bytes = elements * DTYPE.itemsize
            calls = [make() for _ in range(grid.num_calls(num_bytes))]
            bench.add(f"rows: {name}, {rows} rows", calls, num_bytes, flops=0)
        yield
    for rows in grid.batches:
        memory.used = 0
        num_bytes = rows * grid.vocab_size * DTYPE.itemsize
        logits = memory.take(grid.num_calls(num_bytes), rows, grid.vocab_size)
        calls = [partial(torch.argmax, one, -1) for one in logits]
        bench.add(f"rows: argmax, {rows} rows", calls, num_bytes, flops=0)
        yield


FAMILIES: dict[str, Callable[[GpuBench, Grid], Iterator[None]]] = {
    "lora": bench_lora,
    "attention": bench_attention,
    "linears": bench_linears,
    "rows": bench_rows,
}
"""Each gives way when what it has measured so far should be kept."""


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """0, or 1 if a family of cases failed. Raises ValueError where there is no GPU."""
    parser = argparse.ArgumentParser(
        prog,
        description="The kernels of Llama-3-8B's steps on a CUDA device against its memory "
        "bandwidth and arithmetic, as measured beside them.",
    )
    parser.add_argument(
        "--only", nargs="+", choices=list(FAMILIES), default=list(FAMILIES), metavar="FAMILY",
        help=f"some of {', '.join(FAMILIES)}, in this order",
    )  # fmt: skip
    parser.add_argument(
        "--repetitions", type=int, default=7, metavar="N",
        help="replays of each case, of which the median counts (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, help="JSON file to write; the picture goes beside it"
    )
    options = parser.parse_args(argv)
    if options.repetitions < 1:
        raise ValueError(
            f"--repetitions {options.repetitions} is not allowed: it must be 1 or more"
        )
    if not (torch.cuda.is_available() and native.has_cuda()):
        raise ValueError(
            "this benchmark is for CUDA devices, and there is none, or this build has no kernels "
            "for it: benchmarks/cpu_kernels.py measures those of the CPU"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    memory = Memory(min(MEMORY_BYTES, torch.cuda.mem_get_info()[0] * 4 // 5), device)
    torch.manual_seed(0)
    # Each graph begins with a collection of garbage, which need not go through all modules.
    gc.freeze()
    with torch.inference_mode():
        bench = GpuBench(memory, device, options.repetitions)
        return run(bench, Grid(), torch.cuda.get_device_name(), options.only, options.output)


def run(
    bench: GpuBench, grid: Grid, device_name: str, families: Iterable[str], output: Path | None
) -> int:
    """Measure, print and write; see main."""
    table = bench.table
    ceilings: dict[str, Any] = {
        "copy_terabytes_per_second": table.peak_bytes / 1e12,
        "matmul_teraflops": table.peak_flops / 1e12,
        "launch_microseconds": bench.launch_seconds * 1e6,
    }
    nominal = NOMINAL.get(device_name)
    if nominal is not None:
        ceilings["nominal_terabytes_per_second"] = nominal[0] / 1e12
        ceilings["nominal_teraflops"] = nominal[1] / 1e12
    print(f"{device_name}, bfloat16")
    for name, value in ceilings.items():
        print(f"  {name.replace('_', ' '):32}{value:8.2f}")
    print(HEADING, flush=True)
    failures: dict[str, str] = {}

    def save() -> Path:
        cases = [asdict(figure) for figure in table.figures]
        figures = {**ceilings, "cases": cases, "failures": failures}
        return write_result("gpu_kernels", figures, output)

    for family in families:
        # What was measured is worth keeping, and so is what the next families will say.
        try:
            for _ in FAMILIES[family](bench, grid):
                save()
        except (RuntimeError, ValueError) as error:
            failures[family] = str(error)
            print(f"{family} failed: {error}", flush=True)
    path = save()
    print(f"written to {path}")
    shares: dict[str, dict[str, float]] = {}
    for figure in table.figures:
        panel, _, label = figure.case.partition(": ")
        shares.setdefault(panel, {})[label] = figure.share_of_ceiling
    picture = plot_shares(shares, f"{device_name}: share of the floor", path.with_suffix(".png"))
    if picture is not None:
        print(f"written to {picture}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
