"""Turns a step plan into arrays. Knows requests and numpy; no torch.

Running requests have a slot, a row in arrays that persist between steps, so that a step only
gathers: its cost grows with the tokens of the step, not with the length of the requests.
"""

from __future__ import annotations

from functools import reduce
from operator import is_, or_
from typing import Any

import numpy as np

from loraplex.engine.adapters.manager import Adapter
from loraplex.engine.request import Request
from loraplex.engine.runner.sampling_state import SamplingState
from loraplex.engine.step import Int32Array, PoolingSpan, PromptLogprobsSpan, StepBatch, StepPlan

# Requests without an adapter sort behind all others.
BASE_SORT_KEY = np.iinfo(np.int64).max
PENDING = -1


class InputBatch:
    """Rows of the running requests: their tokens, blocks and sampling parameters."""

    def __init__(
        self, max_num_seqs: int, max_model_len: int, block_size: int, vocab_size: int
    ) -> None:
        self._block_size = block_size
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        # PENDING where a token is on its way. The last row, slot -1, is for tokens of requests that
        # have stopped meanwhile, and nobody reads it.
        self._token_ids = np.zeros((max_num_seqs + 1, max_model_len), np.int32)
        self._block_table = np.zeros((max_num_seqs, -(-max_model_len // block_size)), np.int32)
        self._num_blocks = [0] * max_num_seqs
        # With those on their way.
        self._num_tokens = np.zeros(max_num_seqs, np.int32)
        self._num_prompt_tokens = np.zeros(max_num_seqs, np.int32)
        self._sort_key = np.zeros(max_num_seqs, np.int64)
        self._adapter_start = np.zeros(max_num_seqs, np.int32)
        self._sampling = SamplingState(max_num_seqs, vocab_size)
        self._segments = _Segments()

    def release(self, stopped: list[Request]) -> None:
        """Take the slots back of requests that stopped running."""
        for request in stopped:
            if request.slot >= 0:
                self._sampling.remove(request.slot)
                self._free_slots.append(request.slot)
                request.slot = -1

    def build(self, plan: StepPlan) -> StepBatch:
        """The arrays of this step; see StepBatch. What it samples is on its way from then on."""
        self._sync_slots(plan)
        planned = list(plan.num_new_tokens)
        slots = np.fromiter((r.slot for r in planned), np.int64, len(planned))
        num_new_tokens = np.fromiter(plan.num_new_tokens.values(), np.int32, len(planned))
        seq_lens = np.fromiter((r.num_computed_tokens for r in planned), np.int32, len(planned))
        # A step's tokens of a request are all before its adapter acts, or all behind.
        is_base = seq_lens <= self._adapter_start[slots]
        sort_key = np.where(is_base, BASE_SORT_KEY, self._sort_key[slots])
        order = np.argsort(sort_key, kind="stable")
        slots, num_new_tokens, seq_lens = slots[order], num_new_tokens[order], seq_lens[order]
        requests = [planned[i] for i in order.tolist()]
        num_base = int(np.count_nonzero(sort_key == BASE_SORT_KEY))
        cu_seqlens_q = np.zeros(len(requests) + 1, np.int32)
        np.cumsum(num_new_tokens, out=cu_seqlens_q[1:])

        row_slots = np.repeat(slots, num_new_tokens)
        first_positions = np.repeat(seq_lens - cu_seqlens_q[1:], num_new_tokens)
        positions = np.arange(cu_seqlens_q[-1], dtype=np.int64) + first_positions
        blocks, offsets = np.divmod(positions, self._block_size)
        most_blocks = -(-int(seq_lens.max()) // self._block_size)
        token_ids = self._token_ids[row_slots, positions]

        sampled = np.flatnonzero(seq_lens == self._num_tokens[slots])
        sampled_slots = slots[sampled]
        num_output_tokens = self._num_tokens[sampled_slots] - self._num_prompt_tokens[sampled_slots]
        sampling = self._sampling.gather(
            sampled_slots,
            num_output_tokens,
            self._token_ids,
            self._num_prompt_tokens,
            self._num_tokens,
        )
        self._token_ids[sampled_slots, seq_lens[sampled]] = PENDING
        self._num_tokens[sampled_slots] += 1
        return StepBatch(
            requests=requests,
            num_new_tokens=num_new_tokens,
            token_ids=token_ids,
            token_slots=np.where(token_ids == PENDING, row_slots, -1).astype(np.int32),
            positions=positions,
            cu_seqlens_q=cu_seqlens_q,
            seq_lens=seq_lens,
            block_table=self._block_table[slots, :most_blocks],
            slot_mapping=self._block_table[row_slots, blocks] * np.int64(self._block_size)
            + offsets,
            **self._segments.build(requests[: len(requests) - num_base], cu_seqlens_q),
            sampled=sampled,
            sampled_slots=sampled_slots.astype(np.int32),
            logits_rows=cu_seqlens_q[1:][sampled].astype(np.int64) - 1,
            sampling=sampling,
            prompt_logprobs=_prompt_logprobs_spans(requests, num_new_tokens, cu_seqlens_q),
            pooling=_pooling_spans(requests, num_new_tokens, cu_seqlens_q),
        )

    def append_tokens(self, batch: StepBatch, token_ids: list[int]) -> None:
        """Put the tokens that a step sampled where they were on their way to."""
        # Not batch.sampled_slots: those of requests that have stopped may be others' by now.
        slots = np.fromiter(
            (batch.requests[i].slot for i in batch.sampled.tolist()), np.int64, len(token_ids)
        )
        self._token_ids[slots, batch.seq_lens[batch.sampled]] = token_ids

    def _sync_slots(self, plan: StepPlan) -> None:
        """Give slots to requests that began to run, and take in what blocks all of them got."""
        for request in plan.num_new_tokens:
            if request.slot < 0:
                self._occupy(request)
            known, slot = self._num_blocks[request.slot], request.slot
            if len(request.block_table) != known:
                new_blocks = request.block_table[known:]
                self._block_table[slot, known : known + len(new_blocks)] = new_blocks
                self._num_blocks[slot] = len(request.block_table)

    def _occupy(self, request: Request) -> None:
        slot = request.slot = self._free_slots.pop()
        num_tokens = len(request.all_token_ids)
        self._token_ids[slot, :num_tokens] = request.all_token_ids
        self._num_tokens[slot] = num_tokens
        self._num_prompt_tokens[slot] = request.num_prompt_tokens
        self._num_blocks[slot] = 0
        adapter = request.adapter
        self._sort_key[slot] = BASE_SORT_KEY if adapter is None else adapter.sort_key
        self._adapter_start[slot] = request.adapter_start
        self._sampling.add(slot, request.wire, request.grammar)


class _Segments:
    """Runs of requests with one adapter, as StepBatch has them. Steps mostly have the adapters of
    the step before, and then what only depends on those is kept."""

    def __init__(self) -> None:
        self._page_tables: list[Int32Array] = []
        self._fields: dict[str, Any] = {}

    def build(self, requests: list[Request], cu_seqlens_q: Int32Array) -> dict[str, Any]:
        """requests: those with an adapter, in the order of the batch."""
        indptr = [0]
        adapters: list[Adapter] = []
        for request, end in zip(requests, cu_seqlens_q[1:].tolist(), strict=False):
            assert request.adapter is not None
            if adapters and adapters[-1] is request.adapter:
                indptr[-1] = end
            else:
                adapters.append(request.adapter)
                indptr.append(end)
        # An adapter that is loaded again has another.
        page_tables = [adapter.page_table for adapter in adapters]
        is_same = len(page_tables) == len(self._page_tables) and all(
            map(is_, page_tables, self._page_tables)
        )
        if not is_same or not self._fields:
            self._page_tables = page_tables
            self._fields = _fields_of(adapters)
        return {"segment_indptr": np.array(indptr, np.int32), **self._fields}


def _fields_of(adapters: list[Adapter]) -> dict[str, Any]:
    most_pages = max((len(a.pages) for a in adapters), default=0)
    page_tables = np.zeros((len(adapters), most_pages), np.int32)
    for row, adapter in enumerate(adapters):
        page_tables[row, : len(adapter.pages)] = adapter.page_table
    traits = [adapter.traits for adapter in adapters]
    return {
        "page_tables": page_tables,
        "max_rank": max((t.max_rank for t in traits), default=0),
        "module_mask": reduce(or_, (t.module_mask for t in traits), 0),
        "traits": traits,
        "vector_mask": reduce(or_, (t.vector_mask for t in traits), 0),
        "has_ends": any(t.has_ends for t in traits),
    }


def _prompt_logprobs_spans(
    requests: list[Request], num_new_tokens: Int32Array, cu_seqlens_q: Int32Array
) -> list[PromptLogprobsSpan]:
    spans = []
    for index, request in enumerate(requests):
        num_logprobs = request.wire.sampling_params.prompt_logprobs
        if num_logprobs is None:
            continue
        # Rows of positions [num_computed, end) score tokens one further. Some may have been scored
        # already, before a preemption.
        num_computed = request.num_computed_tokens - int(num_new_tokens[index])
        start = max(num_computed, request.num_scored_tokens)
        end = min(request.num_computed_tokens, request.num_prompt_tokens - 1)
        if start < end:
            request.num_scored_tokens = end
            spans.append(
                PromptLogprobsSpan(
                    request=request,
                    first_row=int(cu_seqlens_q[index]) + start - num_computed,
                    target_ids=np.array(request.all_token_ids[start + 1 : end + 1], np.int32),
                    num_logprobs=num_logprobs,
                )
            )
    return spans


def _pooling_spans(
    requests: list[Request], num_new_tokens: Int32Array, cu_seqlens_q: Int32Array
) -> list[PoolingSpan]:
    spans = []
    for index, request in enumerate(requests):
        if request.pooled is None:
            continue
        num_computed = request.num_computed_tokens - int(num_new_tokens[index])
        start, end = request.pooled.plan(num_computed, request.num_computed_tokens)
        if start < end:
            row = int(cu_seqlens_q[index]) + start - num_computed
            spans.append(PoolingSpan(request, row, end - start))
    return spans
