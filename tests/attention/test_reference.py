"""The reference backend against dense attention with transformers' masks."""

from __future__ import annotations

import pytest
import torch
from attention_batch import MIXED, SOFT_CAPS, WINDOWS, Batch
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


@pytest.mark.parametrize("window", [None, 16, 100])
def test_a_chunk_equals_the_whole_but_for_rounding(window: int | None) -> None:
    batch = Batch([(5, 9), (130, 140)], torch.float32, logits_soft_cap=30.0)
    batch.check_chunks("reference", 1, window)
