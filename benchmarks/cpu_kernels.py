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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch

from loraplex import native
from loraplex.benchmarks.results import write_result
from loraplex.engine.models import ops as model_ops
from loraplex.lora import ops
from loraplex.lora.image import layout_image
from loraplex.lora.spec import BaseModelSpec, LoRAModule

Call = Callable[[], object]

# SmolLM2-135M.
NUM_LAYERS, HIDDEN, INTERMEDIATE = 30, 576, 1536
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 9, 3, 64
BLOCK_SIZE = 16
WIDTHS = {
    "q_proj": (HIDDEN, NUM_HEADS * HEAD_DIM),
    "k_proj": (HIDDEN, NUM_KV_HEADS * HEAD_DIM),
    "v_proj": (HIDDEN, NUM_KV_HEADS * HEAD_DIM),
    "o_proj": (NUM_HEADS * HEAD_DIM, HIDDEN),
    "gate_proj": (HIDDEN, INTERMEDIATE),
    "up_proj": (HIDDEN, INTERMEDIATE),
    "down_proj": (INTERMEDIATE, HIDDEN),
}
GROUPS = [[0, 1, 2], [3], [4, 5], [6]]
SPEC = BaseModelSpec(
    "llama",
    NUM_LAYERS,
    tuple(LoRAModule(name, name, inputs, outputs) for name, (inputs, outputs) in WIDTHS.items()),
)


@dataclass
class Figure:
    """One case: what it moved and computed, and how long that took."""

    case: str
    microseconds: float
    gigabytes_per_second: float
    gflops: float
    share_of_ceiling: float


class Bench:
    def __init__(self, dtype: torch.dtype, seconds: float) -> None:
        self.dtype, self.seconds = dtype, seconds
        self.itemsize = dtype.itemsize
        self.figures: list[Figure] = []
        self.peak_bytes = self.measure_reading()
        self.peak_flops = self.measure_products()

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
        seconds = self.best(calls)
        floor = max(num_bytes / self.peak_bytes, flops / self.peak_flops)
        figure = Figure(
            case, seconds * 1e6, num_bytes / seconds / 1e9, flops / seconds / 1e9, floor / seconds
        )
        self.figures.append(figure)
        print(
            f"{case:44}{figure.microseconds:12.1f}{figure.gigabytes_per_second:9.1f}"
            f"{figure.gflops:9.1f}{figure.share_of_ceiling:9.0%}",
            flush=True,
        )


class LoraCase:
    """Adapters of one rank in shuffled pages, and a step's rows."""

    def __init__(self, dtype: torch.dtype, num_adapters: int, rows: int, rank: int) -> None:
        page_bytes = NUM_LAYERS * 2 * BLOCK_SIZE * NUM_KV_HEADS * HEAD_DIM * dtype.itemsize
        places = {(layer, m): rank for layer in range(NUM_LAYERS) for m in range(len(WIDTHS))}
        layout = layout_image(places, SPEC, page_bytes, dtype.itemsize)
        num_pages = num_adapters * layout.num_pages
        self.pool = torch.empty(num_pages, page_bytes, dtype=torch.uint8)
        self.pool.view(dtype).normal_()
        self.page_tables = torch.randperm(num_pages).int().view(num_adapters, -1)
        header = torch.from_numpy(layout.header).flatten().view(torch.uint8)
        for pages in self.page_tables:
            self.pool[pages[0], : len(header)] = header
        per_adapter = torch.full((num_adapters,), rows // num_adapters)
        self.segment_indptr = torch.tensor([0, *per_adapter.cumsum(0)], dtype=torch.int32)
        self.x = {n: torch.randn(rows, n).to(dtype) for n in (HIDDEN, INTERMEDIATE)}
        self.y = torch.zeros(rows, 2 * INTERMEDIATE, dtype=dtype)
        self.v = torch.zeros(rows, 3, rank)
        elements = NUM_LAYERS * rank * sum(i + o for i, o in WIDTHS.values())
        self.num_bytes = num_adapters * elements * dtype.itemsize
        self.flops = 2 * rows * elements

    def groups(self) -> Iterator[tuple[list[int], tuple]]:
        for layer in range(NUM_LAYERS):
            for modules in GROUPS:
                arguments = (self.pool, self.segment_indptr, self.page_tables)
                yield modules, (*arguments, layer, modules, len(WIDTHS))

    def shrinks(self) -> list[Call]:
        return [
            partial(
                ops.shrink,
                self.v[:, : len(modules)],
                self.x[SPEC.modules[modules[0]].in_features],
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
                [0, *accumulate(SPEC.modules[module].out_features for module in modules)],
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
        layers = 8
        num_blocks = -(-context // BLOCK_SIZE)
        num_pages = num_requests * num_blocks
        pool = torch.randn(num_pages, layers, 2, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
        pool = pool.to(bench.dtype)
        block_table = torch.randperm(num_pages).int().view(num_requests, -1)
        cu_seqlens_q = torch.arange(num_requests + 1).int() * num_queries
        seq_lens = torch.full((num_requests,), context, dtype=torch.int32)
        num_tokens = num_requests * num_queries
        q = torch.randn(num_tokens, NUM_HEADS, HEAD_DIM).to(bench.dtype)
        out = torch.empty_like(q)

        calls = [
            partial(
                native.paged_attention, out, q, pool[:, layer, 0], pool[:, layer, 1], block_table,
                cu_seqlens_q, seq_lens, HEAD_DIM**-0.5, None, 0.0,
            )
            for layer in range(layers)
        ]  # fmt: skip
        pairs = num_requests * num_queries * (context - (num_queries - 1) / 2)
        bench.add(
            f"attention {kind} {num_requests} x {num_queries} on {context}, {layers} layers",
            calls,
            num_bytes=pool.nbytes,
            flops=layers * 4 * pairs * NUM_HEADS * HEAD_DIM,
        )


def bench_rows(bench: Bench, rows: int) -> None:
    """Small operations; what they touch is in the cache, so that only the time says something."""
    x, residual = torch.randn(2, rows, HIDDEN).to(bench.dtype)
    weight = torch.ones(HIDDEN, dtype=bench.dtype)
    bench.add(
        f"fused_add_rms_norm {rows} rows",
        [lambda: model_ops.fused_add_rms_norm(x, residual, weight, 1e-5)],
        num_bytes=4 * x.nbytes,
        flops=0,
    )
    qkv = torch.randn(rows, NUM_HEADS + 2 * NUM_KV_HEADS, HEAD_DIM).to(bench.dtype)
    q, k, v = qkv.split([NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS], dim=1)
    angles = torch.rand(2048, HEAD_DIM // 2)
    cache = torch.cat((angles.cos(), angles.sin()), -1)
    positions = torch.arange(rows)
    bench.add(
        f"apply_rope {rows} rows",
        [lambda: model_ops.apply_rope(positions, q, k, cache)],
        num_bytes=2 * (q.nbytes + k.nbytes),
        flops=0,
    )
    pages = torch.zeros(256, 2, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, dtype=bench.dtype)
    slots = torch.randperm(256 * BLOCK_SIZE)[:rows]
    bench.add(
        f"write_kv {rows} rows",
        [lambda: native.write_kv(k, v, pages[:, 0], pages[:, 1], slots)],
        num_bytes=2 * (k.nbytes + v.nbytes),
        flops=0,
    )
    gate_up = torch.randn(rows, 2 * INTERMEDIATE).to(bench.dtype)
    bench.add(
        f"silu_and_mul {rows} rows",
        [lambda: model_ops.silu_and_mul(gate_up)],
        num_bytes=1.5 * gate_up.nbytes,
        flops=0,
    )


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
        f"{bench.peak_bytes / 1e9:.1f} GB/s and computes {bench.peak_flops / 1e9:.0f} GFLOP/s"
    )
    print(f"{'case':44}{'us':>12}{'GB/s':>9}{'GFLOP/s':>9}{'ceiling':>9}")
    bench_lora(bench)
    bench_attention(bench)
    for rows in (64, 512):
        bench_rows(bench, rows)
    path = write_result(
        f"cpu_kernels_{isa}_{options.dtype}",
        {
            "isa": isa,
            "threads": options.threads,
            "read_gigabytes_per_second": bench.peak_bytes / 1e9,
            "matmul_gflops": bench.peak_flops / 1e9,
            "cases": [asdict(figure) for figure in bench.figures],
        },
        options.output,
    )
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
