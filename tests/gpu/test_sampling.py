"""The CUDA sampling kernel against its CPU twin, bit for bit, and the engine's sampler."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sampling_rows import ALL_SHAPES, make_batch, make_rows, num_unlike_the_sampler, sample

from loraplex.engine.messages import EngineRequest
from loraplex.engine.runner.adjusted_logits import adjust
from loraplex.engine.runner.sampling_state import SamplingState
from loraplex.engine.sampling_params import SamplingParams

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


def request_of(params: SamplingParams, bad_words: list[list[int]]) -> EngineRequest:
    return EngineRequest(
        request_id="r",
        prompt_token_ids=[1, 2],
        sampling_params=params,
        max_tokens=99,
        eos_token_ids=[7],
        seed=0,
        bad_words_token_ids=bad_words,
    )


def test_adjusting_logits_waits_for_nothing() -> None:
    """Every kind of adjustment at once, on either device to the same end."""
    vocab_size, slots = 32000, np.arange(64)
    state = SamplingState(64, vocab_size)
    params = SamplingParams(
        logit_bias={5: 3.0}, min_tokens=9, repetition_penalty=1.3, presence_penalty=0.5,
        frequency_penalty=0.5, allowed_token_ids=range(0, vocab_size, 7), bad_words=["x"],
    )  # fmt: skip
    for slot in range(0, 64, 2):
        state.add(slot, request_of(params, [[3, 4], [14]]))
    for slot in range(1, 64, 2):
        state.add(slot, request_of(SamplingParams(), []))
    token_ids = np.tile(np.array([1, 2, 3, 3], np.int32), (64, 1))
    num_prompt, num_tokens = np.full(64, 2, np.int32), np.full(64, 4, np.int32)
    batch = state.gather(slots, num_tokens - num_prompt, token_ids, num_prompt, num_tokens)
    assert batch.adjustments is not None
    logits = torch.randn(64, vocab_size).bfloat16()
    on_gpu = logits.cuda()
    adjust(on_gpu, batch.adjustments)  # pins memory, once
    torch.cuda.set_sync_debug_mode("error")
    try:
        adjusted = adjust(on_gpu, batch.adjustments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(adjusted.cpu(), adjust(logits, batch.adjustments))
