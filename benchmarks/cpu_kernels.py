"""The native CPU kernels against what the machine could do: bytes read, or products computed.

Each case goes through layers whose weights or keys together are more than the caches hold, as in a
real step. The ceilings are measured on the same machine, in the same run:
reading memory, and torch's own matrix product.

    python benchmarks/cpu_kernels.py [--isa avx512] [--dtype float32] [--threads 1]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from loraplex import native
from loraplex.attention.backend import get_backend
from loraplex.benchmarks.kernel_cases import (
    GROUPS,
    HEADING,
    AttentionCase,
    Call,
    FigureTable,
    ModelShape,
    attention_shape,
    group_widths,
    row_operations,
    scatter_images,
    uniform_layout,
)
from loraplex.benchmarks.results import write_result
from loraplex.benchmarks.roofline import rank_elements
from loraplex.lora import ops
from loraplex.lora.page_memory import allocate_pages

# SmolLM2-135M.
SHAPE = ModelShape(
    num_layers=30, hidden=576, intermediate=1536, num_heads=9, num_kv_heads=3, head_dim=64
)
SPEC = SHAPE.spec(SHAPE.num_layers)
ATTENTION_LAYERS = 8


class Bench:
    def __init__(self, dtype: torch.dtype, seconds: float) -> None:
        self.dtype, self.seconds = dtype, seconds
        self.table = FigureTable(self.measure_reading(), self.measure_products())

    def best(self, calls: Sequence[Call]) -> float:
        """Seconds that the calls take one after another.

        The sum of each one's fastest time in many rounds, because the machine may have other work.
        """
        best = [float("inf")] * len(calls)
        end = time.perf_counter() + self.seconds
        while time.perf_counter() < end or best[-1] == float("inf"):
            for index, call in enumerate(calls):
                start = time.perf_counter()
                call()
                best[index] = min(best[index], time.perf_counter() - start)
        return sum(best)

    def measure_reading(self) -> float:
        chunks = torch.ones(1 << 28, dtype=torch.uint8).view(torch.int64).chunk(64)
        return (1 << 28) / self.best([chunk.max for chunk in chunks])

    def measure_products(self) -> float:
        a, b = torch.randn(2, 512, 512).to(self.dtype)
        out = torch.empty_like(a)
        return 2 * 512**3 / self.best([lambda: torch.mm(a, b, out=out)])

    def add(self, case: str, calls: Sequence[Call], num_bytes: float, flops: float) -> None:
        self.table.add(case, self.best(calls), num_bytes, flops)

    def new(self, *sizes: int) -> torch.Tensor:
        return torch.randn(*sizes).to(self.dtype)


class LoraCase:
    """Adapters of one rank in shuffled pages, and a step's rows."""

    def __init__(self, dtype: torch.dtype, num_adapters: int, rows: int, rank: int) -> None:
        page_bytes = SHAPE.page_bytes(dtype.itemsize)
        layout = uniform_layout(SPEC, rank, page_bytes, dtype.itemsize)
        num_pages = num_adapters * layout.num_pages
        self.pool = allocate_pages(num_pages * page_bytes).view(num_pages, page_bytes)
        self.pool.view(dtype).normal_()
        self.page_tables = scatter_images(self.pool, layout, num_adapters)
        per_adapter = torch.full((num_adapters,), rows // num_adapters)
        self.segment_indptr = torch.tensor([0, *per_adapter.cumsum(0)], dtype=torch.int32)
        self.x = {n: torch.randn(rows, n).to(dtype) for n in (SHAPE.hidden, SHAPE.intermediate)}
        self.y = torch.zeros(rows, 2 * SHAPE.intermediate, dtype=dtype)
        self.v = torch.zeros(rows, 3, rank)
        elements = rank * rank_elements(SPEC)
        self.num_bytes = num_adapters * elements * dtype.itemsize
        self.flops = 2 * rows * elements

    def groups(self) -> Iterator[tuple[list[int], tuple]]:
        for layer in range(SHAPE.num_layers):
            for modules in GROUPS.values():
                arguments = (self.pool, self.segment_indptr, self.page_tables)
                yield modules, (*arguments, layer, modules, SPEC.num_modules)

    def shrinks(self) -> list[Call]:
        return [
            partial(
                ops.shrink,
                self.v[:, : len(modules)],
                self.x[group_widths(SPEC, modules)[0]],
                *arguments,
            )
            for modules, arguments in self.groups()
        ]

    def expands(self) -> list[Call]:
        return [
            partial(
                ops.expand,
                self.y,
                self.v[:, : len(modules)],
                *arguments,
                group_widths(SPEC, modules)[1],
            )
            for modules, arguments in self.groups()
        ]

    def steps(self) -> list[Call]:
        pairs = zip(self.shrinks(), self.expands(), strict=True)
        return [call for pair in pairs for call in pair]


def bench_lora(bench: Bench) -> None:
    for num_adapters, rows, rank in [(16, 64, 16), (64, 64, 16), (16, 16, 64), (1, 1, 16)]:
        case = LoraCase(bench.dtype, num_adapters, rows, rank)
        name = f"LoRA decode {rows} rows / {num_adapters} adapters, r{rank}"
        bench.add(name, case.steps(), case.num_bytes, case.flops)
        if num_adapters == 16:
            bench.add("  shrink alone", case.shrinks(), case.num_bytes / 2, case.flops / 2)
            bench.add("  expand alone", case.expands(), case.num_bytes / 2, case.flops / 2)
    for rows, rank in [(256, 16), (512, 64)]:
        case = LoraCase(bench.dtype, 1, rows, rank)
        name = f"LoRA prefill {rows} rows / 1 adapter, r{rank}"
        bench.add(name, case.steps(), case.num_bytes, case.flops)
        bench.add("  shrink alone", case.shrinks(), case.num_bytes / 2, case.flops / 2)
        bench.add("  expand alone", case.expands(), case.num_bytes / 2, case.flops / 2)


def bench_attention(bench: Bench) -> None:
    cases = [("decode", 1, 16, 2048), ("decode", 1, 64, 256), ("decode", 1, 1, 8192)]
    cases += [("prefill", 1024, 1, 1024), ("prefill", 256, 4, 256), ("prefill", 512, 1, 4096)]
    for kind, num_queries, num_requests, context in cases:
        case = AttentionCase(SHAPE, num_requests, num_queries, context)
        backend = get_backend(
            "native",
            attention_shape(SHAPE, bench.dtype, torch.device("cpu"), num_requests, case.num_pages),
        )
        pool = bench.new(case.num_pages, ATTENTION_LAYERS, *case.kv_sizes)
        bench.add(
            f"attention {kind} {num_requests} x {num_queries} on {context}, "
            f"{ATTENTION_LAYERS} layers",
            case.calls(backend, pool, bench.new(ATTENTION_LAYERS, *case.qkv_sizes)),
            num_bytes=ATTENTION_LAYERS * case.elements * bench.dtype.itemsize,
            flops=ATTENTION_LAYERS * case.flops,
        )


def bench_rows(bench: Bench, rows: int) -> None:
    """Small operations; what they touch is in the cache, so that only the time says something."""
    for name, make, elements in row_operations(SHAPE, rows, bench.new, num_kv_pages=256):
        bench.add(f"{name} {rows} rows", [make()], elements * bench.dtype.itemsize, flops=0)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog,
        description="The native CPU kernels against the machine's memory bandwidth and arithmetic.",
    )
    parser.add_argument(
        "--isa",
        choices=list(native.supported_cpu_isas()),
        default=native.get_cpu_isa(),
        help="instruction set (default: %(default)s, the best one here)",
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s"
    )
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="to repeat a case for (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(argv)
    native.set_cpu_isa(options.isa)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    bench = Bench(getattr(torch, options.dtype), options.seconds)
    isa = native.get_cpu_isa()
    print(
        f"{isa}, {options.dtype}, {options.threads} threads; this machine reads "
        f"{bench.table.peak_bytes / 1e9:.1f} GB/s and computes "
        f"{bench.table.peak_flops / 1e9:.0f} GFLOP/s"
    )
    print(HEADING)
    bench_lora(bench)
    bench_attention(bench)
    for rows in (64, 512):
        bench_rows(bench, rows)
    path = write_result(
        f"cpu_kernels_{isa}_{options.dtype}",
        {
            "isa": isa,
            "threads": options.threads,
            "read_gigabytes_per_second": bench.table.peak_bytes / 1e9,
            "matmul_gflops": bench.table.peak_flops / 1e9,
            "cases": [asdict(figure) for figure in bench.table.figures],
        },
        options.output,
    )
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
