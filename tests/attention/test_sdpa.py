"""Attention by torch's scaled_dot_product_attention against the reference backend in float64."""

from __future__ import annotations

import pytest
import torch
from attention_batch import (
    DTYPES,
    KV_DTYPES,
    MIXED,
    WINDOWED,
    WINDOWS,
    Batch,
    same_bytes,
)

from loraplex.attention import sdpa
from loraplex.attention.backend import get_backend

DECODE = [(1, 1), (1, 17), (1, 16), (1, 300), (1, 130), (1, 17)]
# torch's own kernel multiplies bfloat16 weights, and sums in another order.
RELATIVE_ERROR = {torch.float32: 1e-6, torch.bfloat16: 4e-3}


@pytest.fixture(autouse=True)
def seed(one_thread: None) -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 112])
@pytest.mark.parametrize("requests", [MIXED, DECODE, [(0, 0), (1, 5), (0, 7), (2, 2)]])
def test_head_dims(dtype: torch.dtype, head_dim: int, requests: list[tuple[int, int]]) -> None:
    Batch(requests, dtype, head_dim=head_dim).check("sdpa", None, RELATIVE_ERROR)


@pytest.mark.parametrize(("num_kv_heads", "group"), [(1, 1), (4, 1), (2, 2), (1, 5)])
def test_groups(num_kv_heads: int, group: int) -> None:
    Batch(MIXED, torch.float32, num_kv_heads=num_kv_heads, group=group).check("sdpa")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("block_size", [5, 16])
def test_windows(
    dtype: torch.dtype, kv_dtype: torch.dtype | None, window: int | None, block_size: int
) -> None:
    batch = Batch(WINDOWED + DECODE, dtype, block_size=block_size, kv_dtype=kv_dtype)
    batch.check("sdpa", window, RELATIVE_ERROR)


@pytest.mark.parametrize("window", [None, 16, 100])
def test_a_chunk_equals_the_whole_but_for_rounding(window: int | None) -> None:
    Batch([(5, 9), (130, 140)], torch.float32).check_chunks("sdpa", 1, window)


@pytest.mark.parametrize("window", [None, 1, 100])
def test_small_groups(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    batch = Batch(WINDOWED + DECODE, torch.float32)
    bytes_per_key = 2 * 2 * 64 * 4
    monkeypatch.setattr(sdpa, "MAX_COPIED_BYTES", 200 * bytes_per_key)
    monkeypatch.setattr(sdpa, "MAX_QUERIES", 16)
    batch.check("sdpa", window)
    groups = batch.plan("sdpa").groups[window]
    assert sum(group.rows.numel() for group in groups) == len(batch.q)
    assert max(group.rows.shape[1] for group in groups) == 16
    for group in groups:
        assert group.rows.shape[0] == 1 or group.pages.numel() <= 200


def test_decode_is_one_group() -> None:
    batch = Batch(DECODE, torch.float32)
    assert [group.rows.shape for group in batch.plan("sdpa").groups[None]] == [(6, 1)]


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_write_kv(kv_dtype: torch.dtype | None) -> None:
    batch = Batch(MIXED, torch.float32, head_dim=80, kv_dtype=kv_dtype)
    expected = [cache.clone() for cache in (batch.k_cache, batch.v_cache)]
    batch.plan("reference").write_kv(batch.k, batch.v, *expected)
    batch.plan("sdpa").write_kv(batch.k, batch.v, batch.k_cache, batch.v_cache)
    for cache, want in zip((batch.k_cache, batch.v_cache), expected, strict=True):
        assert same_bytes(cache, want)


def test_a_soft_cap_is_refused() -> None:
    shape = Batch([(1, 1)], torch.float32, logits_soft_cap=50.0).shape
    with pytest.raises(ValueError, match=r"'sdpa' is not allowed.*logits_soft_cap=50\.0"):
        get_backend("sdpa", shape)
