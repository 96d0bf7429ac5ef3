"""The reference backend against dense attention with transformers' masks."""

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
    WINDOWS,
    Batch,
)
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function


@pytest.fixture(autouse=True)
def seed(one_thread: None) -> None:
    torch.manual_seed(0)


def dense(batch: Batch, request: int, window: int | None) -> torch.Tensor:
    """Attention of one request's rows, from keys and values that lie side by side, in float64."""
    shape, (num_queries, context) = batch.shape, batch.requests[request]
    positions = torch.arange(context)
    pages = batch.metadata.block_table[request, positions // shape.block_size].long()
    k, v = (
        cache[pages, positions % shape.block_size].double().transpose(0, 1)
        for cache in (batch.k_cache, batch.v_cache)
    )
    begin, end = batch.bounds()[request]
    q = batch.q[begin:end].double().transpose(0, 1)
    heads = torch.arange(shape.num_heads) // (shape.num_heads // shape.num_kv_heads)
    scores = q @ k[heads].transpose(1, 2) * shape.scale
    if shape.logits_soft_cap:
        scores = torch.tanh(scores / shape.logits_soft_cap) * shape.logits_soft_cap
    mask = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    queries = positions[context - num_queries :, None]
    scores[:, ~mask(0, 0, queries, positions)] = -torch.inf
    return (scores.softmax(-1) @ v[heads]).transpose(0, 1)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("logits_soft_cap", SOFT_CAPS)
def test_windows_and_soft_caps(window: int | None, logits_soft_cap: float) -> None:
    batch = Batch(MIXED, torch.float32, logits_soft_cap=logits_soft_cap)
    result = batch.exact(window)
    for request, (begin, end) in enumerate(batch.bounds()):
        torch.testing.assert_close(result[begin:end], dense(batch, request, window))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("window", [None, 16])
def test_dtypes(dtype: torch.dtype, kv_dtype: torch.dtype | None, window: int | None) -> None:
    batch = Batch(MIXED, dtype, kv_dtype=kv_dtype)
    result = batch.run("reference", window)
    for request, (begin, end) in enumerate(batch.bounds()):
        exact = dense(batch, request, window)
        error = (result[begin:end].double() - exact).norm()
        assert error <= RELATIVE_ERROR[dtype] * exact.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_float8_caches_get_the_nearest_number(dtype: torch.dtype) -> None:
    """An even one of two, the greatest for what is beyond it, and what is read later is that."""
    batch = Batch([(8, 8)], dtype, head_dim=1, num_kv_heads=1, kv_dtype=FLOAT8)
    k = torch.tensor([1.0, 1.0625, 1.1875, -1.125, 500.0, -torch.inf, 2.0**-10, 3 * 2.0**-10])
    k, v = (x.to(dtype).view(8, 1, 1) for x in (k, -k))
    batch.plan("reference").write_kv(k, v, batch.k_cache, batch.v_cache)
    expected = torch.tensor([1.0, 1.0, 1.25, -1.125, 448.0, -448.0, 0.0, 2 * 2.0**-9])
    page = batch.metadata.block_table[0, 0]
    assert torch.equal(batch.k_cache[page, :8].flatten().float(), expected)
    assert torch.equal(batch.v_cache[page, :8].flatten().float(), -expected)


@pytest.mark.parametrize("window", [None, 16, 100])
def test_a_chunk_equals_the_whole_but_for_rounding(window: int | None) -> None:
    batch = Batch([(5, 9), (130, 140)], torch.float32, logits_soft_cap=30.0)
    batch.check_chunks("reference", 1, window)
