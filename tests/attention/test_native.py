"""The attention kernels against the reference backend in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_shapes import make_shape

from loraplex import native
from loraplex.attention.backend import get_backend
from loraplex.attention.metadata import AttentionMetadata

DTYPES = [torch.float32, torch.bfloat16]
# Of the norm of the result. bfloat16: rounding the result and, where the machine multiplies
# bfloat16, the weights; each adds 0.0015 on average.
RELATIVE_ERROR = {torch.float32: 1e-6, torch.bfloat16: 2.5e-3}
# (query rows, context) of each request
MIXED = [(1, 1), (1, 17), (9, 9), (1, 130), (5, 70), (33, 33), (1, 64)]


class Batch:
    """Random requests in shuffled pages of a pool of several layers, whose other bytes are NaN."""

    def __init__(
        self,
        requests: list[tuple[int, int]],
        dtype: torch.dtype,
        head_dim: int = 64,
        num_kv_heads: int = 2,
        group: int = 3,
        block_size: int = 16,
    ) -> None:
        self.requests, self.block_size, self.scale = requests, block_size, head_dim**-0.5
        num_blocks = [-(-context // block_size) for _, context in requests]
        num_pages, num_layers, layer = sum(num_blocks) + 3, 3, 1
        pool = torch.full(
            (num_pages, num_layers, 2, block_size, num_kv_heads, head_dim), torch.nan, dtype=dtype
        )
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
            self.fill(request_slots, num_kv_heads, head_dim)
            slots.append(request_slots[context - num_queries :].long())
        self.metadata = AttentionMetadata(
            cu_seqlens_q=torch.tensor([0, *(n for n, _ in requests)]).cumsum(0).int(),
            seq_lens=torch.tensor([context for _, context in requests]).int(),
            block_table=block_table,
            slot_mapping=torch.cat(slots),
            max_query_len=max(n for n, _ in requests),
        )
        num_tokens = len(self.metadata.slot_mapping)
        # As the model has them: heads of q, k and v side by side in one tensor.
        num_heads = num_kv_heads * group
        self.qkv = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim).to(dtype)
        self.q, self.k, self.v = self.qkv.split([num_heads, num_kv_heads, num_kv_heads], dim=1)

    def fill(self, slots: torch.Tensor, num_kv_heads: int, head_dim: int) -> None:
        index = (slots.long() // self.block_size, slots.long() % self.block_size)
        for cache in (self.k_cache, self.v_cache):
            cache[index] = torch.randn(len(slots), num_kv_heads, head_dim).to(cache.dtype)

    def run(self, q: torch.Tensor | None = None) -> torch.Tensor:
        backend = get_backend("native", make_shape(self.scale, self.block_size))
        q = self.q if q is None else q
        return backend.plan(self.metadata).run(q, self.k_cache, self.v_cache)

    def exact(self) -> torch.Tensor:
        backend = get_backend("reference", make_shape(self.scale, self.block_size))
        caches = self.k_cache.double(), self.v_cache.double()
        return backend.plan(self.metadata).run(self.q.double(), *caches)

    def check(self) -> None:
        exact, result = self.exact(), self.run().double()
        for begin, end in self.bounds():
            error = (result[begin:end] - exact[begin:end]).norm()
            bound = exact[begin:end].norm() * RELATIVE_ERROR[self.q.dtype]
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
        )
        return metadata, self.q[rows.start : rows.stop]

    def run_part(self, request: int, queries: slice = slice(None)) -> torch.Tensor:
        metadata, q = self.part(request, queries)
        backend = get_backend("native", make_shape(self.scale, self.block_size))
        return backend.plan(metadata).run(q, self.k_cache, self.v_cache)


@pytest.fixture(autouse=True)
def seed(one_thread: None) -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 40, 64, 80, 96, 128, 250, 256])
def test_head_dims(isa: str, dtype: torch.dtype, head_dim: int) -> None:
    Batch(MIXED, dtype, head_dim=head_dim).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_kv_heads", "group"), [(1, 1), (4, 1), (2, 2), (1, 5), (1, 8), (1, 71)]
)
def test_groups(isa: str, dtype: torch.dtype, num_kv_heads: int, group: int) -> None:
    Batch(MIXED, dtype, num_kv_heads=num_kv_heads, group=group).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 5, 8, 16, 32, 100])
def test_block_sizes(isa: str, dtype: torch.dtype, block_size: int) -> None:
    Batch(MIXED, dtype, block_size=block_size).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "requests",
    [
        [(1, n) for n in (2, 15, 16, 31, 63, 65, 127, 128, 129)],
        [(n, n) for n in (2, 15, 16, 17, 63, 64, 65, 130)],
        [(n, 200) for n in (2, 16, 17, 48, 49, 199, 200)],
        [(1, 512), (1, 513), (1, 1100), (16, 1024), (17, 700), (3, 2000)],
        [(0, 0), (1, 5), (0, 7), (2, 2)],
    ],
    ids=["decode", "prefill", "chunks", "split_keys", "idle"],
)
def test_lengths(isa: str, dtype: torch.dtype, requests: list[tuple[int, int]]) -> None:
    Batch(requests, dtype).check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_large_magnitude(isa: str, dtype: torch.dtype) -> None:
    batch = Batch([(4, 150), (1, 600)], dtype)
    batch.qkv *= 30
    exact, result = batch.exact(), batch.run().double()
    assert (result - exact).norm() / exact.norm() < 10 * RELATIVE_ERROR[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_chunk_equals_the_whole_but_for_rounding(isa: str, dtype: torch.dtype) -> None:
    batch = Batch([(5, 9), (130, 140)], dtype)
    begin, end = batch.bounds()[1]
    whole = batch.run()[begin:end]
    for size in (1, 7, 64):
        chunks = [batch.run_part(1, slice(i, i + size)) for i in range(0, 130, size)]
        error = (torch.cat(chunks).double() - whole.double()).norm() / whole.double().norm()
        assert error <= RELATIVE_ERROR[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_request_does_not_depend_on_its_company(isa: str, dtype: torch.dtype) -> None:
    batch = Batch([*MIXED, (1, 900), (20, 600)], dtype)
    whole = batch.run()
    for request, (begin, end) in enumerate(batch.bounds()):
        assert torch.equal(batch.run_part(request), whole[begin:end])


def test_result_does_not_depend_on_the_number_of_threads(isa: str) -> None:
    batch = Batch([*MIXED, (1, 1700), (100, 300)], torch.bfloat16)
    results = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        results.append(batch.run())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_strides_of_q(isa: str) -> None:
    batch = Batch(MIXED, torch.bfloat16)
    assert not batch.q.is_contiguous()
    assert torch.equal(batch.run(), batch.run(batch.q.contiguous()))
    heads_first = batch.q.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(batch.run(), batch.run(heads_first))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 50, 64])
def test_write_kv(isa: str, dtype: torch.dtype, head_dim: int) -> None:
    batch = Batch(MIXED, dtype, head_dim=head_dim)
    expected = [cache.clone() for cache in (batch.k_cache, batch.v_cache)]
    shape = make_shape(1.0, batch.block_size)
    get_backend("reference", shape).plan(batch.metadata).write_kv(batch.k, batch.v, *expected)
    get_backend("native", shape).plan(batch.metadata).write_kv(
        batch.k, batch.v, batch.k_cache, batch.v_cache
    )
    for cache, want in zip((batch.k_cache, batch.v_cache), expected, strict=True):
        assert torch.equal(cache.nan_to_num(7.0), want.nan_to_num(7.0))


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="attention_backend='fast' is not allowed.*'native'"):
        get_backend("fast", make_shape(1.0, 16))


class TestErrors:
    @pytest.fixture
    def batch(self) -> Batch:
        return Batch([(1, 20), (3, 40)], torch.bfloat16)

    def run(self, batch: Batch, **changes: object) -> None:
        meta = batch.metadata
        arguments = {
            "out": torch.empty(batch.q.shape, dtype=batch.q.dtype),
            "q": batch.q,
            "k_cache": batch.k_cache,
            "v_cache": batch.v_cache,
            "block_table": meta.block_table,
            "cu_seqlens_q": meta.cu_seqlens_q,
            "seq_lens": meta.seq_lens,
            "scale": 1.0,
        }
        native.paged_attention(*(arguments | changes).values())

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"q": torch.zeros(4, 6, 64).half()}, "q must be of type bfloat16 or float32"),
            ({"q": torch.zeros(4, 6, 64)}, "k_cache must be of type float32, got bfloat16"),
            ({"q": torch.zeros(4, 5, 64).bfloat16()}, "heads, 5, must be a multiple"),
            (
                {"q": torch.zeros(4, 6, 63).bfloat16()},
                r"k_cache must have shape \[\*, \*, \*, 63\]",
            ),
            ({"q": torch.zeros(4, 6, 512).bfloat16()}, "head_dim 512 is more than the 256"),
            ({"out": torch.zeros(4, 6, 32).bfloat16()}, "out must have the shape of q"),
            ({"seq_lens": torch.tensor([20, 2]).int()}, "of request 1 is 2, less than its 3"),
            ({"seq_lens": torch.tensor([20, 99]).int()}, "is 99, more than the 4 blocks"),
            ({"cu_seqlens_q": torch.tensor([0, 5, 4]).int()}, "request 1 ends before it begins"),
            ({"cu_seqlens_q": torch.tensor([0, 1, 9]).int()}, "at most the 4 rows of q"),
            ({"cu_seqlens_q": torch.tensor([0, 1, 4])}, "cu_seqlens_q must be of type int32"),
            ({"block_table": torch.full((2, 4), 99).int()}, "request 0 has page 99"),
            ({"block_table": torch.full((2, 4), -1).int()}, "request 0 has page -1"),
        ],
    )
    def test_bad_arguments(self, batch: Batch, changes: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            self.run(batch, **changes)

    @pytest.mark.parametrize("slot", [-1, 10**6])
    def test_bad_slot(self, batch: Batch, slot: int) -> None:
        slots = batch.metadata.slot_mapping.clone()
        slots[2] = slot
        with pytest.raises(ValueError, match=rf"slot_mapping\[2\] is {slot}"):
            native.write_kv(batch.k, batch.v, batch.k_cache, batch.v_cache, slots)
