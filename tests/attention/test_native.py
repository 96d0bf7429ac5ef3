"""The attention kernels against the reference backend in float64."""

from __future__ import annotations

import pytest
import torch
from attention_batch import (
    DTYPES,
    FLOAT8,
    KV_DTYPES,
    MIXED,
    RELATIVE_ERROR,
    SOFT_CAPS,
    WINDOWED,
    WINDOWS,
    Batch,
    check_float8_writes,
    same_bytes,
)

from loraplex import native


@pytest.fixture(autouse=True)
def seed(one_thread: None) -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("head_dim", [16, 40, 64, 80, 96, 128, 250, 256])
def test_head_dims(
    isa: str, dtype: torch.dtype, kv_dtype: torch.dtype | None, head_dim: int
) -> None:
    Batch(MIXED, dtype, head_dim=head_dim, kv_dtype=kv_dtype).check("native")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_kv_heads", "group"), [(1, 1), (4, 1), (2, 2), (1, 5), (1, 8), (1, 71)]
)
def test_groups(isa: str, dtype: torch.dtype, num_kv_heads: int, group: int) -> None:
    Batch(MIXED, dtype, num_kv_heads=num_kv_heads, group=group).check("native")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("block_size", [1, 5, 8, 16, 32, 100])
def test_block_sizes(
    isa: str, dtype: torch.dtype, kv_dtype: torch.dtype | None, block_size: int
) -> None:
    Batch(MIXED, dtype, block_size=block_size, kv_dtype=kv_dtype).check("native")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
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
def test_lengths(
    isa: str,
    dtype: torch.dtype,
    kv_dtype: torch.dtype | None,
    requests: list[tuple[int, int]],
) -> None:
    Batch(requests, dtype, kv_dtype=kv_dtype).check("native")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("logits_soft_cap", SOFT_CAPS)
def test_windows_and_soft_caps(
    isa: str, dtype: torch.dtype, window: int | None, logits_soft_cap: float
) -> None:
    Batch(WINDOWED, dtype, logits_soft_cap=logits_soft_cap).check("native", window)


@pytest.mark.parametrize("block_size", [1, 5, 100])
def test_windows_in_pages_of_any_size(isa: str, block_size: int) -> None:
    Batch(WINDOWED, torch.float32, block_size=block_size).check("native", 16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 100])
def test_windows_and_soft_caps_of_float8(isa: str, dtype: torch.dtype, window: int | None) -> None:
    batch = Batch(WINDOWED, dtype, logits_soft_cap=30.0, kv_dtype=FLOAT8)
    batch.check("native", window)


def test_keys_before_the_window_are_not_read(isa: str) -> None:
    batch = Batch([(3, 700)], torch.bfloat16)
    expected = batch.run("native", window=530)
    positions = torch.arange(700 - 3 + 1 - 530)
    pages = batch.metadata.block_table[0, positions // 16]
    batch.fill(pages * 16 + positions % 16, torch.nan)
    assert torch.equal(batch.run("native", window=530), expected)


@pytest.mark.parametrize("logits_soft_cap", [0.5, 30.0])
def test_soft_cap_of_scores_of_any_magnitude(isa: str, logits_soft_cap: float) -> None:
    """Where tanh is almost linear, where it bends, and where it is 1."""
    for factor in (0.01, 1.0, 10.0, 1000.0):
        batch = Batch([(4, 150), (1, 600)], torch.float32, logits_soft_cap=logits_soft_cap)
        batch.qkv *= factor
        exact, result = batch.exact(), batch.run("native").double()
        assert (result - exact).norm() / exact.norm() < 5 * RELATIVE_ERROR[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_large_magnitude(isa: str, dtype: torch.dtype) -> None:
    batch = Batch([(4, 150), (1, 600)], dtype)
    batch.qkv *= 30
    exact, result = batch.exact(), batch.run("native").double()
    assert (result - exact).norm() / exact.norm() < 10 * RELATIVE_ERROR[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 100])
def test_every_number_of_float8_is_read_as_it_is(
    isa: str, dtype: torch.dtype, head_dim: int
) -> None:
    """A row that sees one key gets that key's value; NaN stays NaN."""
    values = torch.arange(256).to(torch.uint8).repeat(head_dim).view(FLOAT8)
    values = values.view(256, 1, 1, head_dim)
    keys, is_nan = torch.zeros_like(values), values.isnan()
    q = torch.ones(256, 1, head_dim, dtype=dtype)
    out, requests = torch.empty_like(q), torch.arange(256, dtype=torch.int32)
    native.paged_attention(
        out, q, keys, values, requests[:, None], torch.arange(257, dtype=torch.int32),
        torch.ones_like(requests), 1.0, None, 0.0,
    )  # fmt: skip
    result = out[:, None]
    assert torch.equal(result.isnan(), is_nan)
    assert torch.equal(result[~is_nan], values.to(dtype)[~is_nan])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_chunk_equals_the_whole_but_for_rounding(isa: str, dtype: torch.dtype) -> None:
    batch = Batch([(5, 9), (130, 140)], dtype)
    for window in (None, 1, 16, 100):
        batch.check_chunks("native", 1, window)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_request_does_not_depend_on_its_company(isa: str, dtype: torch.dtype) -> None:
    batch = Batch([*MIXED, (1, 900), (20, 600)], dtype)
    whole = batch.run("native")
    for request, (begin, end) in enumerate(batch.bounds()):
        assert torch.equal(batch.run_part("native", request), whole[begin:end])


def test_result_does_not_depend_on_the_number_of_threads(isa: str) -> None:
    batch = Batch([*MIXED, (1, 1700), (100, 300)], torch.bfloat16)
    results = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        results.append(batch.run("native"))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_strides_of_q(isa: str) -> None:
    batch = Batch(MIXED, torch.bfloat16)
    assert not batch.q.is_contiguous()
    whole = batch.run("native")
    for q in (batch.q.contiguous(), batch.q.transpose(0, 1).contiguous().transpose(0, 1)):
        batch.q = q
        assert torch.equal(batch.run("native"), whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("head_dim", [16, 50, 64])
def test_write_kv(
    isa: str, dtype: torch.dtype, kv_dtype: torch.dtype | None, head_dim: int
) -> None:
    batch = Batch(MIXED, dtype, head_dim=head_dim, kv_dtype=kv_dtype)
    expected = [cache.clone() for cache in (batch.k_cache, batch.v_cache)]
    batch.plan("reference").write_kv(batch.k, batch.v, *expected)
    batch.plan("native").write_kv(batch.k, batch.v, batch.k_cache, batch.v_cache)
    for cache, want in zip((batch.k_cache, batch.v_cache), expected, strict=True):
        assert same_bytes(cache, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [4, 64])
def test_float8_is_rounded_as_by_torch(isa: str, dtype: torch.dtype, head_dim: int) -> None:
    check_float8_writes(head_dim, dtype)


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
            "window": None,
            "soft_cap": 0.0,
        }
        native.paged_attention(*(arguments | changes).values())

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"q": torch.zeros(4, 6, 64).half()}, "q must be of type bfloat16 or float32"),
            ({"q": torch.zeros(4, 6, 64)}, "k_cache must be of type float32 or float8_e4m3fn"),
            (
                {"v_cache": torch.zeros(2, 16, 2, 64).to(FLOAT8)},
                "v_cache must be of type bfloat16, got float8_e4m3fn",
            ),
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
            ({"window": 0}, "window must be None or at least 1, got 0"),
            ({"soft_cap": -1.0}, r"soft_cap must be 0 \(none\) or more, got -1"),
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
