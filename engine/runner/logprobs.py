"""Log-probabilities of tokens, and of the likeliest ones beside them. Knows no requests."""

from __future__ import annotations

import numpy as np
import torch

from loraplex.engine.messages import TokenLogprobs
from loraplex.engine.runner.logits import Int64Array, chunks, largest, take, to_device_of
from loraplex.engine.runner.sampling_state import SamplingBatch

# Tokens to rank first; so many times more while that does not decide.
NUM_CANDIDATES = 80
CANDIDATES_GROWTH = 4


def prompt_logprobs(
    logits: torch.Tensor, target_ids: torch.Tensor, num_logprobs: int
) -> list[TokenLogprobs]:
    """What each row's logits [N, vocab_size] say of the token, int64 [N], that followed it."""
    scores: list[TokenLogprobs] = []
    for rows in chunks(np.arange(len(logits)), logits):
        scores += _score(take(logits, rows), take(target_ids, rows), num_logprobs)
    return scores


def score_sampled(
    logits: torch.Tensor, batch: SamplingBatch, token_ids: Int64Array
) -> list[TokenLogprobs | None] | None:
    wanted = np.flatnonzero(batch.num_logprobs >= 0)
    if len(wanted) == 0:
        return None
    scores: list[TokenLogprobs | None] = [None] * len(token_ids)
    for rows in chunks(wanted, logits):
        most = int(batch.num_logprobs[rows].max())
        found = _score(take(logits, rows), to_device_of(logits, token_ids[rows]), most)
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
        rank[to_device_of(logits, far)] = _rank(take(logits, far), take(chosen, far))

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
        _, token_ids, is_sure = largest(logits, num_candidates)
        if is_sure[:, :count].all():
            return token_ids, is_sure
        num_candidates *= CANDIDATES_GROWTH


def _rank(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """The rank, from 1, of each row's token; int64 [N, 1]."""
    value = logits.gather(1, token_ids)
    all_ids = torch.arange(logits.shape[1], device=logits.device)
    is_before = (logits > value) | ((logits == value) & (all_ids < token_ids))
    return 1 + is_before.sum(-1, keepdim=True)
