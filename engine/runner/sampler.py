"""Logits to tokens. Works on tensors of any device; knows no requests.

The order of things: log-probabilities are of the raw logits; then logit_bias, forbidden tokens,
the penalties and the masks of grammars and allowed_token_ids; then, for rows that are not greedy,
temperature, min_p, top_k, top_p and the inverse of the cumulative distribution at the row's uniform
number (or at another one, for a token that its grammar refused). Where tokens are ranked, it is by
logit and among equals by token id, so that ties depend neither on the device nor on the batch.

Numbers come back to the host several times in `sample`, for which a GPU has to be waited for:
`native.sample` chooses by the same definition without, from what `adjust` gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from loraplex.engine.messages import TokenLogprobs
from loraplex.engine.runner.adjusted_logits import adjust_part, penalties_of
from loraplex.engine.runner.logits import Int64Array, chunks, column, largest, take
from loraplex.engine.runner.logprobs import score_sampled
from loraplex.engine.runner.sampling_state import (
    LogitAdjustments,
    SamplingBatch,
)

# Of logits [N, vocab_size], the batch, and the N rows of the batch that they are.
Choice = Callable[[torch.Tensor, SamplingBatch, Int64Array], Int64Array]
MassOf = Callable[[torch.Tensor, SamplingBatch, Int64Array], torch.Tensor]


# top_k, top_p and min_p look at the likeliest tokens: so many first, and so many times more while
# that does not decide a row.
NUM_CANDIDATES = 80
CANDIDATES_GROWTH = 4


# Width of the blocks in which the inverse of a cumulative distribution is searched.
BLOCK = 256


@dataclass(slots=True)
class SamplerOutput:
    token_ids: Int64Array
    """[R]"""
    logprobs: list[TokenLogprobs | None] | None
    """[R], None for rows that asked for none; None if no row asked."""


def sample(logits: torch.Tensor, batch: SamplingBatch) -> SamplerOutput:
    """A token for each row. logits: [R, vocab_size] of any floating type; they stay as they are."""
    rows = np.arange(len(logits))
    adjustments = batch.adjustments
    if adjustments is None:
        token_ids = _choose(logits, batch, rows)
    else:
        token_ids = np.empty(len(logits), np.int64)
        for part in chunks(np.arange(len(adjustments.rows)), logits):
            token_ids[adjustments.rows[part]] = _choose_adjusted(logits, batch, adjustments, part)
        plain = np.delete(rows, adjustments.rows)
        token_ids[plain] = _choose(logits, batch, plain)
    return SamplerOutput(token_ids=token_ids, logprobs=score_sampled(logits, batch, token_ids))


def _choose(logits: torch.Tensor, batch: SamplingBatch, rows: Int64Array) -> Int64Array:
    """A token for each of these rows of logits and batch."""
    is_random = batch.temperature[rows] > 0
    has_top_p = batch.top_p[rows] < 1
    has_bound = (batch.top_k[rows] < logits.shape[1]) | (batch.min_p[rows] > 0)
    token_ids = np.empty(len(rows), np.int64)
    for is_mine, choose in (
        (~is_random, partial(_in_chunks, _choose_greedy)),
        (is_random & ~has_top_p & ~has_bound, partial(_in_chunks, _choose_of_all)),
        (is_random & has_top_p & ~has_bound, partial(_choose_of_likely, _mass_of_all)),
        (is_random & has_bound, partial(_choose_of_likely, _mass_unknown)),
    ):
        if is_mine.any():
            token_ids[is_mine] = choose(logits, batch, rows[is_mine])
    return token_ids


def _choose_adjusted(
    logits: torch.Tensor, batch: SamplingBatch, adjustments: LogitAdjustments, part: Int64Array
) -> Int64Array:
    """A token for each of a part of the adjusted rows: a range of indices into adjustments.rows.

    Rows with a grammar get one as if they had none, and another by the grammar's mask only if it
    does not admit that one, since masks take time. The first of the largest logits, if admitted, is
    the first of the largest that are. A token drawn from all, and drawn again from the admitted,
    whose mass is m, if it is not, is t with the probability p(t) + (1 - m) p(t) / m = p(t) / m: as
    if it had been drawn from the admitted at once. That is not so where top_k, top_p or min_p leave
    tokens out: what they leave depends on the mask.
    """
    rows = adjustments.rows[part]
    adjusted, of_part = adjust_part(take(logits, rows), adjustments, part), batch.select(rows)
    found = np.flatnonzero((adjustments.masked >= part[0]) & (adjustments.masked <= part[-1]))
    masked, masks = adjustments.masked[found] - part[0], [adjustments.masks[i] for i in found]
    is_drawn_again = np.zeros(len(found), np.bool_)
    needs_mask = _leaves_out(of_part, logits.shape[1])[masked]
    needs_mask |= np.array([isinstance(mask, np.ndarray) for mask in masks], np.bool_)
    at_once = np.delete(np.arange(len(rows)), masked[needs_mask])
    token_ids = np.full(len(rows), -1)
    token_ids[at_once] = _choose(adjusted, of_part, at_once)

    for i, mask in enumerate(masks):
        if not (needs_mask[i] or isinstance(mask, np.ndarray)):
            is_drawn_again[i] = not mask.admits(int(token_ids[masked[i]]))
    left = np.flatnonzero(needs_mask | is_drawn_again)
    if len(left):
        rows = masked[left]
        penalties = penalties_of(logits, [masks[i] for i in left.tolist()])
        again = of_part.select(rows)
        again.uniform[:] = np.where(
            is_drawn_again[left], adjustments.uniform_again[found[left]], again.uniform
        )
        token_ids[rows] = _choose(penalties.add_(take(adjusted, rows)), again, np.arange(len(left)))
    return token_ids


def _leaves_out(batch: SamplingBatch, vocab_size: int) -> npt.NDArray[np.bool_]:
    """Of each row, whether a bound keeps some of the tokens from being drawn."""
    has_bound = (batch.top_k < vocab_size) | (batch.top_p < 1) | (batch.min_p > 0)
    return (batch.temperature > 0) & has_bound


def _in_chunks(
    choose: Choice, logits: torch.Tensor, batch: SamplingBatch, rows: Int64Array
) -> Int64Array:
    return np.concatenate(
        [choose(take(logits, part), batch, part) for part in chunks(rows, logits)]
    )


def _choose_greedy(logits: torch.Tensor, batch: SamplingBatch, rows: Int64Array) -> Int64Array:
    if logits.device.type == "cpu":
        # numpy's argmax takes a tenth of the time of torch's; it has no bfloat16.
        return logits.float().numpy().argmax(-1)
    return logits.argmax(-1).cpu().numpy()


def _choose_of_all(logits: torch.Tensor, batch: SamplingBatch, rows: Int64Array) -> Int64Array:
    """Of the whole vocabulary: find the block of tokens first, and then the token in it."""
    vocab_size = logits.shape[1]
    in_blocks = vocab_size - vocab_size % BLOCK
    probs = _probabilities(logits, batch, rows)
    masses = probs[:, :in_blocks].unflatten(1, (-1, BLOCK)).sum(-1)
    if in_blocks < vocab_size:
        masses = torch.cat([masses, probs[:, in_blocks:].sum(-1, keepdim=True)], 1)
    block, uniform = _invert_cumulative(masses, column(batch.uniform, rows, logits))
    token_ids = block * BLOCK + torch.arange(BLOCK, device=logits.device)
    probs = probs.gather(1, token_ids.clamp(max=vocab_size - 1)) * (token_ids < vocab_size)
    index, _ = _invert_cumulative(probs, uniform)
    return token_ids.gather(1, index)[:, 0].cpu().numpy()


def _choose_of_likely(
    mass_of: MassOf,
    logits: torch.Tensor,
    batch: SamplingBatch,
    rows: Int64Array,
) -> Int64Array:
    """By min_p, top_k and top_p. mass_of gives the mass that top_p is a share of."""
    token_ids = np.full(len(rows), -1)
    num_candidates = NUM_CANDIDATES
    while len(left := np.flatnonzero(token_ids < 0)):
        choose = partial(_choose_of_candidates, mass_of, min(num_candidates, logits.shape[1]))
        token_ids[left] = _in_chunks(choose, logits, batch, rows[left])
        num_candidates *= CANDIDATES_GROWTH
    return token_ids


def _mass_of_all(logits: torch.Tensor, batch: SamplingBatch, rows: Int64Array) -> torch.Tensor:
    """Of all tokens, in units of the likeliest one's probability; float64 [N, 1]."""
    return 1 / _probabilities(logits, batch, rows).amax(-1, keepdim=True).double()


def _mass_unknown(logits: torch.Tensor, batch: SamplingBatch, rows: Int64Array) -> torch.Tensor:
    """With top_k or min_p, top_p is a share of what they leave. Before that is known, so much that
    no candidate can be chosen; float64 [N, 1]."""
    return torch.full((len(rows), 1), 1e300, dtype=torch.float64, device=logits.device)


def _choose_of_candidates(
    mass_of: MassOf,
    num_candidates: int,
    logits: torch.Tensor,
    batch: SamplingBatch,
    rows: Int64Array,
) -> Int64Array:
    """A token for each row; -1 where more candidates are needed.

    What min_p, top_k and top_p keep of the ranked tokens is a beginning of them.
    """
    values, token_ids, is_sure = largest(logits, num_candidates)
    scaled = values.float() / column(batch.temperature, rows, logits)
    weights = (scaled - scaled[:, :1]).double().exp()
    cumulative = weights.cumsum(-1)
    top_p = column(batch.top_p, rows, logits)

    rank = torch.arange(num_candidates, device=logits.device)
    is_kept = weights >= column(batch.min_p, rows, logits)
    is_kept &= rank < column(batch.top_k, rows, logits)
    last = is_kept.sum(-1, keepdim=True) - 1
    mass = mass_of(logits, batch, rows)
    mass = torch.where(is_sure.gather(1, last), cumulative.gather(1, last), mass)
    is_kept &= (cumulative - weights < top_p * mass) | (top_p == 1)
    last = is_kept.sum(-1, keepdim=True) - 1

    # The mass of what is kept. If top_p cuts beyond the candidates, it is between top_p's share and
    # that plus one token, which is enough to know, unless the choice falls just there.
    is_known = is_sure.gather(1, last)
    least = torch.where(is_known, cumulative.gather(1, last), top_p * mass)
    most = torch.where(is_known, least, least + weights[:, -1:])
    uniform = column(batch.uniform, rows, logits)
    index = torch.searchsorted(cumulative, uniform * torch.cat([least, most], 1), right=True)
    chosen, at_most = index.clamp(max=num_candidates - 1).split(1, dim=1)
    is_decided = (chosen == at_most) & is_sure.gather(1, chosen)
    return torch.where(is_decided, token_ids.gather(1, chosen), -1)[:, 0].cpu().numpy()


def _probabilities(logits: torch.Tensor, batch: SamplingBatch, rows: Int64Array) -> torch.Tensor:
    return torch.softmax(logits.float() / column(batch.temperature, rows, logits), -1)


def _invert_cumulative(
    weights: torch.Tensor, uniform: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the cumulative sum of weights [N, M] passes uniform, float64 [N, 1], times its end.

    Returns the indices, int64 [N, 1], never of weight 0, and how far into its weight each number
    fell, in [0, 1): another uniform number.
    """
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    target = uniform * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True)
    end, weight = cumulative.gather(1, index), weights.gather(1, index)
    return index, (1 - (end - target) / weight).clamp(0, 1 - 2.0**-53)
