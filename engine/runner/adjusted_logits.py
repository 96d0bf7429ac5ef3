"""Logits as requests want them changed: biased, forbidden, penalised, masked. Knows no requests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from loraplex.engine.runner.logits import Int64Array, chunks, take, to_device_of
from loraplex.engine.runner.sampling_state import (
    AnyGrammar,
    Int32Array,
    LogitAdjustments,
    TokensOfRows,
)

# What eight bits of a mask, the lowest first, add to the logits of eight tokens; [256, 8].
OCTET_PENALTIES = np.array(
    [[0.0 if octet >> bit & 1 else -np.inf for bit in range(8)] for octet in range(256)],
    np.float32,
)


def adjust(logits: torch.Tensor, adjustments: LogitAdjustments) -> torch.Tensor:
    """The logits [R, vocab_size] with a batch's adjustments, in float32. Waits for no device: masks
    are made while it works."""
    all_adjusted = logits.to(torch.float32, copy=True)
    for part in chunks(np.arange(len(adjustments.rows)), logits):
        rows = adjustments.rows[part]
        adjusted = adjust_part(take(logits, rows), adjustments, part)
        all_adjusted.index_copy_(0, to_device_of(logits, rows), adjusted.float())
    for part in chunks(np.arange(len(adjustments.masked)), logits):
        rows = adjustments.rows[adjustments.masked[part]]
        penalties = penalties_of(logits, [adjustments.masks[i] for i in part.tolist()])
        all_adjusted.index_add_(0, to_device_of(logits, rows), penalties)
    return all_adjusted


def adjust_part(
    logits: torch.Tensor, adjustments: LogitAdjustments, part: Int64Array
) -> torch.Tensor:
    """Logits with bias, forbidden tokens and penalties, in float32; themselves, if they want none.
    They are of a part of the adjusted rows: a range of indices into adjustments.rows."""
    first, last = part[0], part[-1]

    def locate(tokens: TokensOfRows) -> tuple[torch.Tensor, torch.Tensor, slice]:
        found = slice(*np.searchsorted(tokens.rows, (first, last + 1)))
        rows = to_device_of(logits, tokens.rows[found] - first)
        return rows, to_device_of(logits, tokens.token_ids[found]), found

    biased_rows, biased_ids, found = locate(adjustments.biased)
    # An adapter's tokenizer may have ends that the model lacks.
    forbidden_rows, forbidden_ids, _ = locate(adjustments.forbidden.below(logits.shape[1]))
    prompt_rows, prompt_ids, _ = locate(adjustments.prompt)
    if not len(biased_rows) + len(forbidden_rows) + len(prompt_rows):
        return logits  # No prompt is empty: there are no penalties.
    rows, token_ids, _ = locate(adjustments.output)

    adjusted = logits.to(torch.float32, copy=True)
    adjusted[biased_rows, biased_ids] += to_device_of(logits, adjustments.biases[found])
    # A number of the host's would be waited for.
    adjusted[forbidden_rows, forbidden_ids] = adjusted.new_full((), -torch.inf)
    # Where a token is there several times, the same is written several times.
    seen_rows, seen_ids = torch.cat([prompt_rows, rows]), torch.cat([prompt_ids, token_ids])
    seen = adjusted[seen_rows, seen_ids]
    repetition = to_device_of(logits, adjustments.repetition[part])[seen_rows]
    adjusted[seen_rows, seen_ids] = torch.where(seen > 0, seen / repetition, seen * repetition)
    adjusted[rows, token_ids] -= to_device_of(logits, adjustments.presence[part])[rows]
    frequency = to_device_of(logits, adjustments.frequency[part])[rows]
    adjusted.index_put_((rows, token_ids), -frequency, accumulate=True)
    return adjusted


def penalties_of(logits: torch.Tensor, masks: Sequence[AnyGrammar | Int32Array]) -> torch.Tensor:
    """0 where masks have a bit, else -inf: float32 [N, vocab_size], where the logits are. A byte at
    a time: eight tokens for the price of one."""
    # Tokens that an adapter adds are in no mask.
    words = np.zeros((len(masks), -(-logits.shape[1] // 32)), np.int32)
    for mask, row in zip(masks, words, strict=True):
        if isinstance(mask, np.ndarray):
            row[: len(mask)] = mask
        else:
            mask.fill_mask(row[: mask.mask_words])
    octets = to_device_of(logits, words.view(np.uint8)).int()
    penalties = torch.nn.functional.embedding(octets, to_device_of(logits, OCTET_PENALTIES))
    return penalties.flatten(1)[:, : logits.shape[1]]
