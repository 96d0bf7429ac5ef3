"""What the benchmarks of CPU and GPU kernels share: shapes, cases and the table of figures.

A case is a list of calls, and the bytes and products that they cannot do without. Knows no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch

from loraplex import native
from loraplex.attention.backend import AttentionBackend
from loraplex.attention.metadata import AttentionMetadata, AttentionShape
from loraplex.benchmarks.synthetic_adapters import llama_spec
from loraplex.lora.image import ImageLayout, layout_image
from loraplex.lora.spec import BaseModelSpec

Tensor = torch.Tensor
Call = Callable[[], object]
New = Callable[..., Tensor]
"""Makes a tensor of these sizes, of random numbers in the kernels' dtype, where they run."""

BLOCK_SIZE = 16
GROUPS = {"qkv": [0, 1, 2], "o": [3], "gate_up": [4, 5], "down": [6]}
"""Modules that share an input, by the name of the linear that fuses them."""
MAX_POSITION = 2048
HEADING = f"{'case':44}{'us':>12}{'GB/s':>9}{'GFLOP/s':>10}{'ceiling':>9}"


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Llama."""

    num_layers: int
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def spec(self, num_layers: int) -> BaseModelSpec:
        """The modules of a model with so many of these layers."""
        kv_size = self.num_kv_heads * self.head_dim
        return llama_spec(num_layers, self.hidden, kv_size, self.intermediate)

    def page_bytes(self, itemsize: int) -> int:
        """Of a page of the whole model."""
        return self.num_layers * 2 * BLOCK_SIZE * self.num_kv_heads * self.head_dim * itemsize


def group_widths(spec: BaseModelSpec, modules: list[int]) -> tuple[int, list[int]]:
    """Columns of a group's input, and where its modules begin in the output, with the end."""
    outputs = [spec.modules[module].out_features for module in modules]
    return spec.modules[modules[0]].in_features, [0, *accumulate(outputs)]


@dataclass
class Figure:
    """One case: what it moved and computed, and how long that took."""

    case: str
    microseconds: float
    floor_microseconds: float
    gigabytes_per_second: float
    gflops: float
    share_of_ceiling: float


class FigureTable:
    """Holds cases against the two ceilings of a machine, bytes and products a second; prints a
    line for each."""

    def __init__(self, peak_bytes: float, peak_flops: float) -> None:
        self.peak_bytes, self.peak_flops = peak_bytes, peak_flops
        self.figures: list[Figure] = []

    def add(self, case: str, seconds: float, num_bytes: float, flops: float) -> None:
        floor = max(num_bytes / self.peak_bytes, flops / self.peak_flops)
        figure = Figure(
            case,
            microseconds=seconds * 1e6,
            floor_microseconds=floor * 1e6,
            gigabytes_per_second=num_bytes / seconds / 1e9,
            gflops=flops / seconds / 1e9,
            share_of_ceiling=floor / seconds,
        )
        self.figures.append(figure)
        print(
            f"{case:44}{figure.microseconds:12.1f}{figure.gigabytes_per_second:9.1f}"
            f"{figure.gflops:10.1f}{figure.share_of_ceiling:9.0%}",
            flush=True,
        )


def uniform_layout(spec: BaseModelSpec, rank: int, page_bytes: int, itemsize: int) -> ImageLayout:
    """Of the image of an adapter that has this rank everywhere."""
    places = {(layer, m): rank for layer in range(spec.num_layers) for m in range(spec.num_modules)}
    return layout_image(places, spec, page_bytes, itemsize)


def scatter_images(pool: Tensor, layout: ImageLayout, num_images: int) -> Tensor:
    """Make images of shuffled pages of a pool whose bytes are weights already.

    pool uint8 [at least num_images * layout.num_pages, page_bytes]. Returns the page tables, int32
    [num_images, layout.num_pages], in host memory.
    """
    pages = torch.randperm(len(pool))[: num_images * layout.num_pages].view(num_images, -1)
    header = torch.from_numpy(layout.header).flatten().view(torch.uint8).to(pool.device)
    pool[pages[:, 0].to(pool.device), : len(header)] = header
    return pages.int()


def attention_shape(
    shape: ModelShape, dtype: torch.dtype, device: torch.device, max_num_requests: int,
    max_num_pages: int,
) -> AttentionShape:  # fmt: skip
    return AttentionShape(
        shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.head_dim**-0.5, BLOCK_SIZE,
        dtype, dtype, device, max_num_requests, max_num_pages,
    )  # fmt: skip


@dataclass(frozen=True)
class AttentionCase:
    """Requests with so many tokens of context each, the last num_queries of which are queries."""

    shape: ModelShape
    num_requests: int
    num_queries: int
    context: int

    @property
    def num_pages(self) -> int:
        return self.num_requests * -(-self.context // BLOCK_SIZE)

    @property
    def kv_sizes(self) -> tuple[int, ...]:
        """Of a layer's K and V in a page."""
        return 2, BLOCK_SIZE, self.shape.num_kv_heads, self.shape.head_dim

    @property
    def heads(self) -> tuple[int, int, int]:
        """Of q, k and v."""
        return self.shape.num_heads, self.shape.num_kv_heads, self.shape.num_kv_heads

    @property
    def qkv_sizes(self) -> tuple[int, ...]:
        """Of a layer's queries and their own K and V."""
        return self.num_requests * self.num_queries, sum(self.heads), self.shape.head_dim

    @property
    def elements(self) -> int:
        """That each layer reads and writes: K, V, queries and results, and the queries' K and V."""
        num_tokens = self.num_requests * self.num_queries
        heads = 2 * self.shape.num_kv_heads * self.num_requests * self.context
        heads += 2 * sum(self.heads) * num_tokens
        return heads * self.shape.head_dim

    @property
    def flops(self) -> float:
        """Of each layer."""
        pairs = self.num_requests * self.num_queries * (self.context - (self.num_queries - 1) / 2)
        return 4 * pairs * self.shape.num_heads * self.shape.head_dim

    def calls(self, backend: AttentionBackend, pool: Tensor, qkv: Tensor) -> list[Call]:
        """A call for each layer. pool [num_pages, layers, *kv_sizes], qkv [layers, *qkv_sizes]."""
        block_table = torch.randperm(self.num_pages).int().view(self.num_requests, -1)
        positions = torch.arange(self.context - self.num_queries, self.context)
        slots = block_table[:, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        planned = backend.plan(
            AttentionMetadata(
                cu_seqlens_q=torch.arange(self.num_requests + 1).int() * self.num_queries,
                seq_lens=torch.full((self.num_requests,), self.context, dtype=torch.int32),
                block_table=block_table,
                slot_mapping=slots.flatten().long().to(qkv.device),
                max_query_len=self.num_queries,
                graph_num_tokens=self.num_requests if self.num_queries == 1 else None,
            )
        )
        return [
            partial(
                planned.attend, *of_layer.split(self.heads, 1), pool[:, layer, 0], pool[:, layer, 1]
            )
            for layer, of_layer in enumerate(qkv)
        ]


def row_operations(
    shape: ModelShape, rows: int, new: New, num_kv_pages: int
) -> Iterator[tuple[str, Callable[[], Call], int]]:
    """(name, maker, elements) of the operations on rows by themselves: the maker's calls each have
    rows of their own, and touch so many elements. write_kv's go to pages that all have in common.
    """
    heads, kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    weight = new(shape.hidden)
    device = weight.device

    def rms_norm() -> Call:
        out, x = new(2, rows, shape.hidden)
        return partial(native.rms_norm, out, x, weight, 1e-5, 0.0)

    yield "rms_norm", rms_norm, 2 * rows * shape.hidden

    def fused_add_rms_norm() -> Call:
        x, residual = new(2, rows, shape.hidden)
        return partial(native.fused_add_rms_norm, x, residual, weight, 1e-5, 0.0)

    yield "fused_add_rms_norm", fused_add_rms_norm, 4 * rows * shape.hidden

    angles = torch.rand(MAX_POSITION, head_dim // 2, device=device)
    cos_sin_cache = torch.cat((angles.cos(), angles.sin()), -1)
    positions = torch.arange(rows, device=device) % MAX_POSITION

    def apply_rope() -> Call:
        q, k = new(rows, heads + kv_heads, head_dim).split([heads, kv_heads], dim=1)
        return partial(native.apply_rope, positions, q, k, cos_sin_cache)

    yield "apply_rope", apply_rope, 2 * rows * (heads + kv_heads) * head_dim

    pages = new(num_kv_pages, 2, BLOCK_SIZE, kv_heads, head_dim)

    def write_kv() -> Call:
        k, v = new(2, rows, kv_heads, head_dim)
        slots = torch.randperm(num_kv_pages * BLOCK_SIZE)[:rows].to(device)
        return partial(native.write_kv, k, v, pages[:, 0], pages[:, 1], slots)

    yield "write_kv", write_kv, 4 * rows * kv_heads * head_dim

    def silu_and_mul() -> Call:
        out, gate_up = new(rows, shape.intermediate), new(rows, 2 * shape.intermediate)
        return partial(native.silu_and_mul, out, gate_up)

    yield "silu_and_mul", silu_and_mul, 3 * rows * shape.intermediate
