"""Rows of logits of all kinds under all kinds of limits, for the tests of native.sample on every
device, and what may come out: by definition, in float64."""

from __future__ import annotations

from itertools import product

import numpy as np
import numpy.typing as npt
import torch

from loraplex import native
from loraplex.engine.runner import sampler
from loraplex.engine.runner.sampling_state import EVERYTHING, NO_LOGPROBS, SamplingBatch

VOCAB_SIZES = [1, 2, 7, 40, 255, 256, 257, 1003, 4096, 32003, 130000]
LAST_UNIFORM = 1 - 2.0**-53
# How far from a boundary between two tokens, in shares of all mass, either may be chosen.
TOLERANCE = 1e-6
# Temperature, top_k, top_p, min_p.
LIMITS = [
    (0.0, EVERYTHING, 1.0, 0.0),
    (0.0, 3, 0.5, 0.5),
    (1.0, EVERYTHING, 1.0, 0.0),
    (0.3, EVERYTHING, 1.0, 0.0),
    (3.0, EVERYTHING, 1.0, 0.0),
    (1e-5, EVERYTHING, 1.0, 0.0),
    (0.7, 1, 1.0, 0.0),
    (1.0, 40, 1.0, 0.0),
    (2.0, 3000, 1.0, 0.0),
    (1.0, EVERYTHING, 0.9, 0.0),
    (0.2, EVERYTHING, 0.999, 0.0),
    (1.0, EVERYTHING, 1e-9, 0.0),
    (1.0, EVERYTHING, LAST_UNIFORM, 0.0),
    (1.0, EVERYTHING, 1.0, 0.05),
    (2.0, EVERYTHING, 1.0, 1e-7),
    (1.0, EVERYTHING, 1.0, 1.0),
    (1.0, 50, 0.95, 0.0),
    (1.5, 700, 1.0, 0.001),
    (1.5, EVERYTHING, 0.7, 0.001),
    (0.9, 20, 0.8, 0.02),
    (100.0, 5000, 0.99, 1e-5),
]


def make_rows(vocab_size: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Distributions from flat to peaked, with ties and forbidden tokens; [N, vocab_size]."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(8, vocab_size, generator=generator)
    rows = [normal[0] * spread for spread in (0.01, 3, 40)]
    rows += [torch.full((vocab_size,), -3.7), (normal[1] * 8).round() / 8]
    peaked = normal[2].clone()
    peaked[vocab_size // 2] = 30
    forbidden = normal[3] * 2
    forbidden[normal[4] > 0.5] = -torch.inf
    forbidden[vocab_size // 3] = 1.0
    lonely = torch.full((vocab_size,), -torch.inf)
    lonely[vocab_size * 2 // 3 :: 1000] = 2.5
    signed_zeros = torch.where(normal[5] > 0, 0.0, -0.0) + (normal[6] > 2.5)
    return torch.stack([*rows, peaked, forbidden, lonely, signed_zeros]).to(dtype)


def make_batch(vocab_size: int, num_random: int, seed: int = 0) -> SamplingBatch:
    """All limits, and top_k at the edge of the vocabulary, with the uniform numbers at the ends and
    num_random others."""
    edges = [(1.0, k, 1.0, 0.0) for k in (vocab_size - 1, vocab_size, vocab_size + 1) if k > 0]
    uniforms = np.random.default_rng(seed).random((len(LIMITS) + len(edges), num_random))
    cases = [
        (*limit, number)
        for limit, numbers in zip([*LIMITS, *edges], uniforms.tolist(), strict=True)
        for number in (0.0, LAST_UNIFORM, *numbers)
    ]
    temperature, top_k, top_p, min_p, uniform = map(np.array, zip(*cases, strict=True))
    return SamplingBatch(
        temperature=temperature.astype(np.float32),
        top_k=top_k.astype(np.int32),
        top_p=top_p,
        min_p=min_p,
        uniform=uniform,
        num_logprobs=np.full(len(cases), NO_LOGPROBS, np.int32),
        adjustments=None,
    )


def sample(logits: torch.Tensor, batch: SamplingBatch) -> npt.NDArray[np.int64]:
    """native.sample on the device of the logits, of which one row may be for all."""
    logits = logits.expand(len(batch.uniform), -1)
    token_ids = torch.full((len(logits),), -1, dtype=torch.int64, device=logits.device)
    fields = (batch.temperature, batch.top_k, batch.top_p, batch.min_p, batch.uniform)
    native.sample(
        token_ids, logits, *(torch.from_numpy(field).to(logits.device) for field in fields)
    )
    return token_ids.cpu().numpy()


def num_unlike_the_sampler(
    logits: torch.Tensor, batch: SamplingBatch, token_ids: npt.NDArray[np.int64]
) -> int:
    """Of the tokens chosen of one row, logits [vocab_size], for all cases of the batch. Uniform
    numbers at the very ends do not count: there the tails of a distribution decide, in which the
    sampler keeps what has less than 2 ** -44 of the largest probability, and the op does not."""
    expected = sampler.sample(logits.expand(len(token_ids), -1).contiguous(), batch).token_ids
    is_inside = (batch.uniform > 0) & (batch.uniform < LAST_UNIFORM)
    return int(((token_ids != expected) & is_inside).sum())


class Definition:
    """What tokens may be chosen of one row of logits, float64 [vocab_size]."""

    def __init__(self, logits: npt.NDArray[np.float64]) -> None:
        self._logits = logits
        self._ranked = np.lexsort((np.arange(len(logits)), -logits))

    def find_fault(self, batch: SamplingBatch, case: int, token_id: int) -> str:
        """Why this token can't be chosen; nothing if it can."""
        if batch.temperature[case] == 0:
            return "" if token_id == self._logits.argmax() else "not the first largest"
        order, masses = self._kept(batch, case)
        places = np.flatnonzero(order == token_id)
        if len(places) == 0:
            return "left out"
        cumulative, weights = self._cumulative(batch, case, order)
        place = places[0]
        if weights[place] == 0:
            return "of no probability"
        target = float(batch.uniform[case]) * masses
        slack = TOLERANCE * masses
        before, after = cumulative[place] - weights[place], cumulative[place]
        # The mass of what is kept is between the two, if there are two.
        if target.max() < before - slack[0] or target.min() > after + slack[0]:
            return f"{target} is not between {before} and {after}"
        return ""

    def _kept(
        self, batch: SamplingBatch, case: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Tokens in the order of choice, and the mass of those kept: two, if top_p's limit is where
        either of two tokens could be the last."""
        top_k, top_p, min_p = (float(x[case]) for x in (batch.top_k, batch.top_p, batch.min_p))
        if top_k >= len(self._logits) and top_p == 1 and min_p == 0:
            order = np.arange(len(self._logits))
            return order, self._cumulative(batch, case, order)[0][-1:]
        cumulative, weights = self._cumulative(batch, case, self._ranked)
        num_kept = min(int((weights >= min_p).sum()), int(top_k))
        last = np.array([num_kept - 1])
        if top_p < 1:
            limits = cumulative[last] * top_p * np.array([1 - TOLERANCE, 1 + TOLERANCE])
            last = np.searchsorted(cumulative[:num_kept], limits).clip(max=num_kept - 1)
        return self._ranked[: last[-1] + 1], cumulative[last]

    def _cumulative(
        self, batch: SamplingBatch, case: int, order: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        scaled = self._logits.astype(np.float32) / batch.temperature[case]
        weights = np.exp((scaled - scaled.max()).astype(np.float64))[order]
        return weights.cumsum(), weights


ALL_SHAPES = list(product(VOCAB_SIZES, (torch.float32, torch.bfloat16)))
