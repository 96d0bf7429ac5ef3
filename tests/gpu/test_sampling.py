"""The CUDA sampling kernel against its CPU twin, bit for bit, and the engine's sampler."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sampling_rows import ALL_SHAPES, make_batch, make_rows, num_unlike_the_sampler, sample

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize(("vocab_size", "dtype"), ALL_SHAPES)
def test_all_limits_of_all_distributions(vocab_size: int, dtype: torch.dtype) -> None:
    """tests/native holds the twin to the definition."""
    logits, batch = make_rows(vocab_size, dtype), make_batch(vocab_size, num_random=2)
    on_gpu = logits.cuda()
    num_cases, num_others = len(batch.uniform), 0
    for row, values in enumerate(on_gpu):
        token_ids = sample(values, batch)
        assert np.array_equal(token_ids, sample(logits[row], batch)), row
        num_others += num_unlike_the_sampler(values, batch, token_ids)
    assert num_others <= 0.02 * num_cases * len(logits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", range(9))
def test_rows_begin_anywhere(first: int, dtype: torch.dtype) -> None:
    logits, batch = make_rows(1021, dtype), make_batch(1021, 2)
    logits = logits[torch.randint(len(logits), (len(batch.uniform),))]
    view = slice(first, 1021 - first // 2)
    token_ids = sample(logits.cuda()[:, view], batch)
    assert np.array_equal(token_ids, sample(logits[:, view], batch))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_vocabulary_anywhere(dtype: torch.dtype) -> None:
    vocab_size = 2**19 - 8
    logits, batch = torch.randn(2, vocab_size + 7).to(dtype), make_batch(vocab_size, 1)
    logits = logits[torch.arange(len(batch.uniform)) % 2]
    token_ids = sample(logits.cuda()[:, 7:], batch)
    assert np.array_equal(token_ids, sample(logits[:, 7:], batch))


def test_runs_are_alike() -> None:
    logits, batch = make_rows(128256, torch.bfloat16).cuda(), make_batch(128256, 4)
    logits = logits[torch.arange(len(batch.uniform)) % len(logits)]
    first = sample(logits, batch)
    assert all(np.array_equal(sample(logits, batch), first) for _ in range(5))


def test_without_a_distribution_the_largest_is_chosen() -> None:
    logits = torch.zeros(4, 300)
    logits[0, [40, 290]] = torch.inf
    logits[1] = -torch.inf
    logits[2] = torch.nan
    logits[3, 7], logits[3, 5] = 1.0, torch.nan
    batch = make_batch(300, 1)
    batch = batch.select(np.flatnonzero((batch.temperature == 0) | (batch.top_k == 1)))
    for row, token_id in enumerate((40, 0, 0, 7)):
        assert set(sample(logits[row].cuda(), batch).tolist()) == {token_id}


def test_no_rows() -> None:
    batch = make_batch(8, 1).select(np.zeros(0, np.int64))
    assert len(sample(torch.zeros(0, 8, device="cuda"), batch)) == 0
