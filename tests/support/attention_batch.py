"""Random batches for attention backends, in a pool whose other bytes are NaN."""

from __future__ import annotations

from dataclasses import replace

import torch

from loraplex import native
from loraplex.attention.backend import PlannedAttention, get_backend
from loraplex.attention.metadata import AttentionMetadata, AttentionShape

DTYPES = [torch.float32, torch.bfloat16]
FLOAT8 = torch.float8_e4m3fn
# Of the caches; None: as of the queries.
KV_DTYPES = [None, FLOAT8]
# Of the norm of the result. bfloat16: rounding the result and, where the machine multiplies
# bfloat16, the weights; each adds 0.0015 on average, both up to 0.0029 to a result of 96 numbers.
RELATIVE_ERROR = {torch.float32: 1e-6, torch.bfloat16: 3e-3}
# (query rows, context) of each request
MIXED = [(1, 1), (1, 17), (9, 9), (1, 130), (5, 70), (33, 33), (1, 64)]
# Beside these: keys that the native kernels split, and rows whose windows begin in several blocks.
WINDOWED = [*MIXED, (1, 1100), (16, 560), (130, 700)]
WINDOWS = (None, 1, 7, 16, 100, 530, 10**6)
SOFT_CAPS = [0.0, 30.0]

Requests = list[tuple[int, int]]


class Batch:
    """Random requests in shuffled pages of a pool of several layers; one layer's caches."""

    def __init__(
        self,
        requests: Requests,
        dtype: torch.dtype,
        head_dim: int = 64,
        num_kv_heads: int = 2,
        group: int = 3,
        block_size: int = 16,
        logits_soft_cap: float = 0.0,
        windows: tuple[int | None, ...] = WINDOWS,
        device: str = "cpu",
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        kv_dtype = kv_dtype or dtype
        num_heads = num_kv_heads * group
        num_blocks = [-(-context // block_size) for _, context in requests]
        self.requests = requests
        self.shape = AttentionShape(
            num_heads, num_kv_heads, head_dim, head_dim**-0.5, block_size, dtype, kv_dtype,
            torch.device(device), max_num_requests=len(requests), max_num_pages=sum(num_blocks),
            logits_soft_cap=logits_soft_cap, windows=windows,
        )  # fmt: skip
        num_pages, num_layers, layer = sum(num_blocks) + 3, 3, 1
        pool = torch.full(
            (num_pages, num_layers, 2, block_size, num_kv_heads, head_dim),
            torch.nan, dtype=kv_dtype, device=device,
        )  # fmt: skip
        self.k_cache, self.v_cache = pool[:, layer, 0], pool[:, layer, 1]
        free = (torch.randperm(num_pages - 1) + 1).tolist()
        block_table = torch.full((len(requests), max(num_blocks) + 1), -1, dtype=torch.int32)
        slots = []
        for row, blocks, (num_queries, context) in zip(
            block_table, num_blocks, requests, strict=True
        ):
            row[:blocks] = torch.tensor([free.pop() for _ in range(blocks)])
            positions = torch.arange(context)
            request_slots = row[positions // block_size] * block_size + positions % block_size
            self.fill(request_slots)
            slots.append(request_slots[context - num_queries :].long())
        self.metadata = AttentionMetadata(
            cu_seqlens_q=torch.tensor([0, *(n for n, _ in requests)]).cumsum(0).int(),
            seq_lens=torch.tensor([context for _, context in requests]).int(),
            block_table=block_table,
            slot_mapping=torch.cat(slots).to(device),
            max_query_len=max(n for n, _ in requests),
        )
        num_tokens = len(self.metadata.slot_mapping)
        # As the model has them: heads of q, k and v side by side in one tensor.
        self.qkv = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim).to(device, dtype)
        self.q, self.k, self.v = self.qkv.split([num_heads, num_kv_heads, num_kv_heads], dim=1)

    def fill(self, slots: torch.Tensor, value: float | None = None) -> None:
        """With that value, or a random one for each element."""
        block_size = self.shape.block_size
        index = (slots.long() // block_size, slots.long() % block_size)
        for cache in (self.k_cache, self.v_cache):
            rows = torch.randn(len(slots), *cache.shape[2:])
            cache[index] = (rows if value is None else torch.full_like(rows, value)).to(cache)

    def plan(self, backend: str) -> PlannedAttention:
        return get_backend(backend, self.shape).plan(self.metadata)

    def run(self, backend: str, window: int | None = None) -> torch.Tensor:
        return self.plan(backend).run(self.q, self.k_cache, self.v_cache, window)

    def exact(self, window: int | None = None) -> torch.Tensor:
        caches = self.k_cache.double(), self.v_cache.double()
        return self.plan("reference").run(self.q.double(), *caches, window)

    def check(
        self,
        backend: str,
        window: int | None = None,
        relative_error: dict[torch.dtype, float] = RELATIVE_ERROR,
    ) -> None:
        """Compare each request's rows with the reference in float64."""
        exact, result = self.exact(window), self.run(backend, window).double()
        for begin, end in self.bounds():
            error = (result[begin:end] - exact[begin:end]).norm()
            bound = exact[begin:end].norm() * relative_error[self.q.dtype]
            assert error <= bound, f"{error / bound:.2f} times the bound"

    def bounds(self) -> list[tuple[int, int]]:
        rows = self.metadata.cu_seqlens_q.tolist()
        return list(zip(rows, rows[1:], strict=False))

    def part(self, request: int, queries: slice) -> tuple[AttentionMetadata, torch.Tensor]:
        """Some of a request's query rows as a batch of their own."""
        begin, end = self.bounds()[request]
        rows = range(begin, end)[queries]
        hidden = end - rows.stop  # tokens that come after these rows
        metadata = replace(
            self.metadata,
            cu_seqlens_q=torch.tensor([0, len(rows)], dtype=torch.int32),
            seq_lens=self.metadata.seq_lens[request : request + 1] - hidden,
            block_table=self.metadata.block_table[request : request + 1],
            max_query_len=len(rows),
        )
        return metadata, self.q[rows.start : rows.stop]

    def run_part(
        self,
        backend: str,
        request: int,
        queries: slice = slice(None),
        window: int | None = None,
    ) -> torch.Tensor:
        metadata, q = self.part(request, queries)
        planned = get_backend(backend, self.shape).plan(metadata)
        return planned.run(q, self.k_cache, self.v_cache, window)

    def check_chunks(self, backend: str, request: int, window: int | None = None) -> None:
        """A request that comes in chunks of any size gets what it gets as a whole."""
        begin, end = self.bounds()[request]
        whole = self.run(backend, window)[begin:end].double()
        for size in (1, 7, 64):
            chunks = [
                self.run_part(backend, request, slice(i, i + size), window)
                for i in range(0, end - begin, size)
            ]
            error = (torch.cat(chunks).double() - whole).norm() / whole.norm()
            assert error <= RELATIVE_ERROR[self.q.dtype]


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same, NaN included."""
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def float8_inputs(dtype: torch.dtype) -> torch.Tensor:
    """What is worth rounding to float8: all of bfloat16, or of float32 random bits, random numbers
    of all magnitudes, and everything that is a number of float8, lies halfway between two, or next
    to that. [a multiple of 256]"""
    if dtype == torch.bfloat16:
        return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    numbers = torch.arange(256).to(torch.uint8).view(FLOAT8).float()
    numbers = numbers[numbers.isfinite()].sort().values
    halfway = (numbers[1:] + numbers[:-1]) / 2
    exact = torch.cat([numbers, halfway])
    near = [torch.nextafter(exact, torch.full_like(exact, side)) for side in (-1e9, 1e9)]
    bits = torch.randint(-(2**31), 2**31, (2**16,)).to(torch.int32).view(dtype)
    magnitudes = torch.exp2(torch.randint(-12, 11, (2**16,)))
    inputs = torch.cat([exact, *near, bits, magnitudes * torch.randn(2**16)])
    return torch.cat([inputs, inputs[: -len(inputs) % 256]])


def check_float8_writes(head_dim: int, dtype: torch.dtype, device: str = "cpu") -> None:
    """native.write_kv rounds as torch does; NaN stays NaN, of any sign."""
    x = float8_inputs(dtype).view(-1, 1, head_dim).to(device)
    rows, slots = torch.cat([x, x.flip(0)], dim=1), torch.randperm(len(x), device=device)
    caches = torch.zeros(len(x), 2, 1, 2, head_dim, dtype=FLOAT8, device=device).unbind(1)
    native.write_kv(rows, rows.flip(1), *caches, slots)
    for cache, written in zip(caches, (rows, rows.flip(1)), strict=True):
        result, is_nan = cache[slots, 0], written.isnan()
        expected = written.clamp(-448, 448).to(FLOAT8)
        assert torch.equal(result.isnan(), is_nan)
        assert same_bytes(result[~is_nan], expected[~is_nan])
