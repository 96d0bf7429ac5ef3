"""native.sample against the definition, in float64, and the engine's sampler."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sampling_rows import (
    ALL_SHAPES,
    Definition,
    make_batch,
    make_rows,
    num_unlike_the_sampler,
    sample,
)

from loraplex import native
from loraplex.engine.runner.sampling_state import SamplingBatch

pytestmark = pytest.mark.usefixtures("one_thread")

MAX_VOCAB_SIZE = 2**19 - 8


def check_by_definition(logits: torch.Tensor, batch: SamplingBatch, token_ids: np.ndarray) -> None:
    definition = Definition(logits.double().numpy())
    for case, token_id in enumerate(token_ids.tolist()):
        fault = definition.find_fault(batch, case, token_id)
        assert not fault, (batch.select(np.array([case])), token_id, fault)


@pytest.mark.parametrize(("vocab_size", "dtype"), ALL_SHAPES)
def test_all_limits_of_all_distributions(vocab_size: int, dtype: torch.dtype) -> None:
    """Every token is right, and nearly every one that of the sampler: at the boundaries between
    tokens, rounding decides."""
    batch = make_batch(vocab_size, num_random=1 if vocab_size > 10_000 else 4)
    logits = make_rows(vocab_size, dtype)
    num_cases, num_others = len(batch.uniform), 0
    for values in logits:
        token_ids = sample(values, batch)
        check_by_definition(values, batch, token_ids)
        num_others += num_unlike_the_sampler(values, batch, token_ids)
    assert num_others <= 0.02 * num_cases * len(logits)


@given(
    logits=st.lists(st.one_of(st.floats(-50, 50, width=16), st.just(-np.inf)), min_size=1).filter(
        lambda logits: max(logits) > -np.inf
    ),
    temperature=st.floats(0.05, 5),
    top_k=st.integers(1, 9),
    top_p=st.floats(1e-3, 1),
    min_p=st.floats(0, 1),
    number=st.floats(0, 1, exclude_max=True),
)
def test_any_row(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, number: float
) -> None:
    batch = SamplingBatch(
        temperature=np.array([temperature], np.float32),
        top_k=np.array([top_k], np.int32),
        top_p=np.array([top_p]),
        min_p=np.array([min_p]),
        uniform=np.array([number]),
        num_logprobs=np.array([-1], np.int32),
        adjustments=None,
    )
    row = torch.tensor([logits])
    check_by_definition(row[0], batch, sample(row, batch))


def test_min_p_to_the_last_bit() -> None:
    batch = make_batch(2, 1).select(np.zeros(1, np.int64))
    batch.temperature[0], batch.min_p[0], batch.uniform[0] = 1, 0.5, 0.999
    half = np.log(0.5)
    below = np.float32(half)
    assert np.exp(np.float64(below)) < 0.5
    for logit, token_id in ((below, 0), (np.nextafter(below, np.float32(0)), 1)):
        logits = torch.tensor([[0.0, float(logit)]])
        assert sample(logits, batch)[0] == token_id


def test_instruction_sets_and_threads_choose_alike(isa: str) -> None:
    logits, batch = make_rows(1003, torch.bfloat16), make_batch(1003, 5)
    logits = logits[torch.arange(len(batch.uniform)) % len(logits)]
    token_ids = sample(logits, batch)
    native.set_cpu_isa("portable")
    torch.set_num_threads(3)
    assert np.array_equal(sample(logits, batch), token_ids)


def test_a_row_depends_on_no_other() -> None:
    logits, batch = make_rows(1009, torch.float32), make_batch(1009, 2)
    view = logits[torch.randint(len(logits), (len(batch.uniform),))][:, 3:-3]
    together = sample(view, batch)
    for case in range(0, len(view), 7):
        alone = sample(view[case].clone(), batch.select(np.array([case])))
        assert alone[0] == together[case]


def test_the_largest_vocabulary() -> None:
    logits = torch.zeros(1, MAX_VOCAB_SIZE)
    batch = make_batch(MAX_VOCAB_SIZE, 1)
    plain = (batch.temperature > 0) & (batch.top_p == 1) & (batch.min_p < 1)
    batch = batch.select(np.flatnonzero(plain & (batch.top_k > MAX_VOCAB_SIZE)))
    token_ids = sample(logits, batch)
    assert token_ids.tolist() == (batch.uniform * MAX_VOCAB_SIZE).astype(int).tolist()


@pytest.mark.parametrize(
    ("values", "token_id"),
    [
        ([0.0, np.inf, 1.0, np.inf], 1),
        ([-np.inf] * 4, 0),
        ([0.0, np.nan, 7.0, 7.0], 2),
        ([np.nan] * 4, 0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_distribution_the_largest_is_chosen(
    values: list[float], token_id: int, dtype: torch.dtype
) -> None:
    batch = make_batch(4, 1)
    if not np.isposinf(values).any() and np.isfinite(values).any():
        batch = batch.select(np.flatnonzero((batch.temperature == 0) | (batch.top_k == 1)))
    logits = torch.tensor([values]).to(dtype)
    token_ids = sample(logits, batch)
    assert set(token_ids.tolist()) == {token_id}


def test_no_rows() -> None:
    batch = make_batch(8, 1).select(np.zeros(0, np.int64))
    assert len(sample(torch.zeros(0, 8), batch)) == 0


def test_errors() -> None:
    batch = make_batch(8, 1)
    with pytest.raises(ValueError, match="logits must have 1 to 524280 columns, got 524281"):
        sample(torch.zeros(1, MAX_VOCAB_SIZE + 1), batch)
    with pytest.raises(ValueError, match="logits must be of type bfloat16 or float32, got float16"):
        sample(torch.zeros(1, 8).half(), batch)
    fields = (batch.temperature, batch.top_k, batch.top_p, batch.min_p, batch.uniform)
    with pytest.raises(ValueError, match=r"logits must have shape \[3, \*\], got"):
        native.sample(
            torch.zeros(3, dtype=torch.int64), torch.zeros(1, 8), *map(torch.from_numpy, fields)
        )
    batch.top_p = batch.top_p.astype(np.float32)
    with pytest.raises(ValueError, match="top_p must be of type float64, got float32"):
        sample(torch.zeros(1, 8), batch)
