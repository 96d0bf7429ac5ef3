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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from loraplex.engine.messages import TokenLogprobs
from loraplex.engine.runner.sampling_state import (
    AnyGrammar,
    Int32Array,
    LogitAdjustments,
    SamplingBatch,
    TokensOfRows,
)

Int64Array = npt.NDArray[np.int64]
# Of logits [N, vocab_size], the batch, and the N rows of the batch that they are.
Choice = Callable[[torch.Tensor, SamplingBatch, Int64Array], Int64Array]
MassOf = Callable[[torch.Tensor, SamplingBatch, Int64Array], torch.Tensor]

# Logits worked on at a time. On the CPU, temporaries of more than some MB come from the operating
# system anew each time, which costs several times the arithmetic.
CPU_CHUNK_ELEMENTS = 1 << 19
CHUNK_ELEMENTS = 1 << 26

# top_k, top_p and min_p look at the likeliest tokens: so many first, and so many times more while
# that does not decide a row.
NUM_CANDIDATES = 80
CANDIDATES_GROWTH = 4

# To find the largest elements of a row, maxima over so many stripes of it come first.
NUM_STRIPES = 16

# Width of the blocks in which the inverse of a cumulative distribution is searched.
BLOCK = 256

# What eight bits of a mask, the lowest first, add to the logits of eight tokens; [256, 8].
OCTET_PENALTIES = np.array(
    [[0.0 if octet >> bit & 1 else -np.inf for bit in range(8)] for octet in range(256)],
    np.float32,
)


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
        for part in _chunks(np.arange(len(adjustments.rows)), logits):
            token_ids[adjustments.rows[part]] = _choose_adjusted(logits, batch, adjustments, part)
        plain = np.delete(rows, adjustments.rows)
        token_ids[plain] = _choose(logits, batch, plain)
    return SamplerOutput(token_ids=token_ids, logprobs=_score_sampled(logits, batch, token_ids))


def adjust(logits: torch.Tensor, adjustments: LogitAdjustments) -> torch.Tensor:
    """The logits [R, vocab_size] with a batch's adjustments, in float32. Waits for no device: masks
    are made while it works."""
    all_adjusted = logits.to(torch.float32, copy=True)
    for part in _chunks(np.arange(len(adjustments.rows)), logits):
        rows = adjustments.rows[part]
        adjusted = _adjust(_take(logits, rows), adjustments, part)
        all_adjusted.index_copy_(0, _to(logits, rows), adjusted.float())
    for part in _chunks(np.arange(len(adjustments.masked)), logits):
        rows = adjustments.rows[adjustments.masked[part]]
        penalties = _penalties(logits, [adjustments.masks[i] for i in part.tolist()])
        all_adjusted.index_add_(0, _to(logits, rows), penalties)
    return all_adjusted


def prompt_logprobs(
    logits: torch.Tensor, target_ids: torch.Tensor, num_logprobs: int
) -> list[TokenLogprobs]:
    """What each row's logits [N, vocab_size] say of the token, int64 [N], that followed it."""
    scores: list[TokenLogprobs] = []
    for rows in _chunks(np.arange(len(logits)), logits):
        scores += _score(_take(logits, rows), _take(target_ids, rows), num_logprobs)
    return scores


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
    adjusted, of_part = _adjust(_take(logits, rows), adjustments, part), batch.select(rows)
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
        penalties = _penalties(logits, [masks[i] for i in left.tolist()])
        again = of_part.select(rows)
        again.uniform[:] = np.where(
            is_drawn_again[left], adjustments.uniform_again[found[left]], again.uniform
        )
        token_ids[rows] = _choose(
            penalties.add_(_take(adjusted, rows)), again, np.arange(len(left))
        )
    return token_ids


def _leaves_out(batch: SamplingBatch, vocab_size: int) -> npt.NDArray[np.bool_]:
    """Of each row, whether a bound keeps some of the tokens from being drawn."""
    has_bound = (batch.top_k < vocab_size) | (batch.top_p < 1) | (batch.min_p > 0)
    return (batch.temperature > 0) & has_bound


def _in_chunks(
    choose: Choice, logits: torch.Tensor, batch: SamplingBatch, rows: Int64Array
) -> Int64Array:
    return np.concatenate(
        [choose(_take(logits, part), batch, part) for part in _chunks(rows, logits)]
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
    block, uniform = _invert_cumulative(masses, _column(batch.uniform, rows, logits))
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
    values, token_ids, is_sure = _largest(logits, num_candidates)
    scaled = values.float() / _column(batch.temperature, rows, logits)
    weights = (scaled - scaled[:, :1]).double().exp()
    cumulative = weights.cumsum(-1)
    top_p = _column(batch.top_p, rows, logits)

    rank = torch.arange(num_candidates, device=logits.device)
    is_kept = weights >= _column(batch.min_p, rows, logits)
    is_kept &= rank < _column(batch.top_k, rows, logits)
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
    uniform = _column(batch.uniform, rows, logits)
    index = torch.searchsorted(cumulative, uniform * torch.cat([least, most], 1), right=True)
    chosen, at_most = index.clamp(max=num_candidates - 1).split(1, dim=1)
    is_decided = (chosen == at_most) & is_sure.gather(1, chosen)
    return torch.where(is_decided, token_ids.gather(1, chosen), -1)[:, 0].cpu().numpy()


def _probabilities(logits: torch.Tensor, batch: SamplingBatch, rows: Int64Array) -> torch.Tensor:
    return torch.softmax(logits.float() / _column(batch.temperature, rows, logits), -1)


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


def _largest(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The count largest values of each row, ranked: values, token ids and whether the rank is
    sure, [N, count] each. It is not for those that equal the last, since others may be missing."""
    vocab_size = logits.shape[1]
    if vocab_size % NUM_STRIPES or 2 * NUM_STRIPES * count > vocab_size:
        values, token_ids = logits.topk(count, sorted=False)
    else:
        # Columns of stripes: the largest elements are in those with the largest maxima.
        width = vocab_size // NUM_STRIPES
        stripes = logits.unflatten(1, (NUM_STRIPES, width))
        columns = stripes.amax(1).topk(count, sorted=False).indices
        starts = torch.arange(0, vocab_size, width, device=logits.device)
        token_ids = (starts[:, None] + columns[:, None, :]).flatten(1)
        values, index = logits.gather(1, token_ids).topk(count, sorted=False)
        token_ids = token_ids.gather(1, index)
    # One integer that is ordered like (value, -token_id): a float's bits are, but for the sign
    # (and for -0, to which adding 0 gives 0).
    bits = (values.float() + 0.0).view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    order = ((ordered << 32) - token_ids).argsort(descending=True)
    values, token_ids = values.gather(1, order), token_ids.gather(1, order)
    is_sure = values > values[:, -1:] if count < vocab_size else torch.ones_like(values).bool()
    return values, token_ids, is_sure


def _adjust(logits: torch.Tensor, adjustments: LogitAdjustments, part: Int64Array) -> torch.Tensor:
    """Logits with bias, forbidden tokens and penalties, in float32; themselves, if they want none.
    They are of a part of the adjusted rows: a range of indices into adjustments.rows."""
    first, last = part[0], part[-1]

    def locate(tokens: TokensOfRows) -> tuple[torch.Tensor, torch.Tensor, slice]:
        found = slice(*np.searchsorted(tokens.rows, (first, last + 1)))
        rows = _to(logits, tokens.rows[found] - first)
        return rows, _to(logits, tokens.token_ids[found]), found

    biased_rows, biased_ids, found = locate(adjustments.biased)
    forbidden_rows, forbidden_ids, _ = locate(adjustments.forbidden)
    prompt_rows, prompt_ids, _ = locate(adjustments.prompt)
    if not len(biased_rows) + len(forbidden_rows) + len(prompt_rows):
        return logits  # No prompt is empty: there are no penalties.
    rows, token_ids, _ = locate(adjustments.output)

    adjusted = logits.to(torch.float32, copy=True)
    adjusted[biased_rows, biased_ids] += _to(logits, adjustments.biases[found])
    adjusted[forbidden_rows, forbidden_ids] = -torch.inf
    # Where a token is there several times, the same is written several times.
    seen_rows, seen_ids = torch.cat([prompt_rows, rows]), torch.cat([prompt_ids, token_ids])
    seen = adjusted[seen_rows, seen_ids]
    repetition = _to(logits, adjustments.repetition[part])[seen_rows]
    adjusted[seen_rows, seen_ids] = torch.where(seen > 0, seen / repetition, seen * repetition)
    adjusted[rows, token_ids] -= _to(logits, adjustments.presence[part])[rows]
    frequency = _to(logits, adjustments.frequency[part])[rows]
    adjusted.index_put_((rows, token_ids), -frequency, accumulate=True)
    return adjusted


def _penalties(logits: torch.Tensor, masks: Sequence[AnyGrammar | Int32Array]) -> torch.Tensor:
    """0 where masks have a bit, else -inf: float32 [N, vocab_size], where the logits are. A byte at
    a time: eight tokens for the price of one."""
    words = np.empty((len(masks), -(-logits.shape[1] // 32)), np.int32)
    for mask, row in zip(masks, words, strict=True):
        if isinstance(mask, np.ndarray):
            row[:] = mask
        else:
            mask.fill_mask(row)
    octets = _to(logits, words.view(np.uint8)).int()
    penalties = torch.nn.functional.embedding(octets, _to(logits, OCTET_PENALTIES))
    return penalties.flatten(1)[:, : logits.shape[1]]


def _score_sampled(
    logits: torch.Tensor, batch: SamplingBatch, token_ids: Int64Array
) -> list[TokenLogprobs | None] | None:
    wanted = np.flatnonzero(batch.num_logprobs >= 0)
    if len(wanted) == 0:
        return None
    scores: list[TokenLogprobs | None] = [None] * len(token_ids)
    for rows in _chunks(wanted, logits):
        most = int(batch.num_logprobs[rows].max())
        found = _score(_take(logits, rows), _to(logits, token_ids[rows]), most)
        for row, score in zip(rows.tolist(), found, strict=True):
            num_entries = 1 + int(batch.num_logprobs[row])
            scores[row] = TokenLogprobs(
                token_ids=score.token_ids[:num_entries],
                logprobs=score.logprobs[:num_entries],
                ranks=score.ranks[:num_entries],
            )
    return scores


def _score(logits: torch.Tensor, chosen: torch.Tensor, num_logprobs: int) -> list[TokenLogprobs]:
    """Of each row [N, vocab_size]: its chosen token, int64 [N], and the num_logprobs likeliest."""
    num_logprobs = min(num_logprobs, logits.shape[1])
    logits, chosen = logits.float(), chosen[:, None]
    candidates, is_sure = _likeliest(logits, num_logprobs)
    likeliest = candidates[:, :num_logprobs]
    ranks = torch.arange(1, 1 + num_logprobs, device=logits.device).expand_as(likeliest)

    is_chosen = is_sure & (candidates == chosen)
    rank = 1 + is_chosen.int().argmax(-1, keepdim=True)
    far = np.flatnonzero(~is_chosen.any(-1).cpu().numpy())
    if len(far):
        rank[_to(logits, far)] = _rank(_take(logits, far), _take(chosen, far))

    token_ids = torch.cat([chosen, likeliest], 1)
    logprobs = torch.log_softmax(logits, -1).gather(1, token_ids)
    ranks = torch.cat([rank, ranks], 1)
    entries = zip(token_ids.tolist(), logprobs.tolist(), ranks.tolist(), strict=True)
    return [TokenLogprobs(*entry) for entry in entries]


def _likeliest(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest tokens of each row, ranked, and whether the rank is sure; [N, C] each. It is
    for the first count of them at least."""
    num_candidates = max(NUM_CANDIDATES, 2 * count)
    while True:
        num_candidates = min(num_candidates, logits.shape[1])
        _, token_ids, is_sure = _largest(logits, num_candidates)
        if is_sure[:, :count].all():
            return token_ids, is_sure
        num_candidates *= CANDIDATES_GROWTH


def _rank(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """The rank, from 1, of each row's token; int64 [N, 1]."""
    value = logits.gather(1, token_ids)
    all_ids = torch.arange(logits.shape[1], device=logits.device)
    is_before = (logits > value) | ((logits == value) & (all_ids < token_ids))
    return 1 + is_before.sum(-1, keepdim=True)


def _chunks(rows: Int64Array, logits: torch.Tensor) -> Iterator[Int64Array]:
    """The rows in parts whose logits are not too many to work on at a time."""
    most = CPU_CHUNK_ELEMENTS if logits.device.type == "cpu" else CHUNK_ELEMENTS
    step = max(1, most // logits.shape[1])
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def _take(tensor: torch.Tensor, rows: Int64Array) -> torch.Tensor:
    """These rows, ascending, of a tensor; a view if they are side by side."""
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1:
        return tensor[rows[0] : rows[-1] + 1]
    return tensor[_to(tensor, rows)]


def _to(tensor: torch.Tensor, array: npt.NDArray) -> torch.Tensor:
    """The array on the tensor's device, without waiting for what that does."""
    copied = torch.from_numpy(array)
    if tensor.device.type == "cuda":
        # A copy from memory that may be paged out waits for all that the device was given before.
        copied = copied.pin_memory()
    return copied.to(tensor.device, non_blocking=True)


def _column(parameter: npt.NDArray, rows: Int64Array, tensor: torch.Tensor) -> torch.Tensor:
    """A parameter of these rows as a column, [N, 1], on the tensor's device."""
    return _to(tensor, parameter[rows])[:, None]
