"""The contract between the host and the device, one step at a time. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from loraplex.engine.messages import TokenLogprobs
from loraplex.engine.request import Request
from loraplex.engine.runner.sampling_state import SamplingBatch
from loraplex.lora.spec import AdapterTraits

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


@dataclass(slots=True)
class StepPlan:
    """What the scheduler decided: how many tokens of which requests are computed."""

    num_new_tokens: dict[Request, int] = field(default_factory=dict)
    stopped: list[Request] = field(default_factory=list)
    """Requests that stopped running since the last plan: finished, aborted or preempted. One that
    was preempted may run again in this very plan."""

    @property
    def num_tokens(self) -> int:
        return sum(self.num_new_tokens.values())


@dataclass(slots=True)
class PromptLogprobsSpan:
    """Rows whose logits are wanted to score the next prompt tokens."""

    request: Request
    first_row: int
    target_ids: Int32Array
    num_logprobs: int


@dataclass(slots=True)
class PoolingSpan:
    """Rows whose hidden states are wanted, added up."""

    request: Request
    first_row: int
    num_rows: int


@dataclass(slots=True)
class StepBatch:
    """A step as arrays. Requests are ordered by adapter, base model last.

    R requests, T tokens, S adapter segments, L rows with logits.
    """

    requests: list[Request]
    num_new_tokens: Int32Array  # [R]

    # Model input.
    token_ids: Int32Array  # [T], -1 where the token is still on its way
    token_slots: Int32Array  # [T], there: the slot of its request; -1 where token_ids has it
    positions: Int64Array  # [T]

    # Attention.
    cu_seqlens_q: Int32Array  # [R + 1]
    seq_lens: Int32Array  # [R], with this step's tokens
    block_table: Int32Array  # [R, most blocks of a request here]
    slot_mapping: Int64Array  # [T]

    # LoRA. Rows from segment_indptr[-1] on are of the base model.
    segment_indptr: Int32Array  # [S + 1]
    page_tables: Int32Array  # [S, most pages of an adapter here]
    max_rank: int
    module_mask: int
    """Bit m is set if any adapter here targets module m."""
    traits: list[AdapterTraits]  # [S]
    vector_mask: int
    """Bit m is set if any adapter here has a gain and an offset for module m; as a rule 0."""
    has_ends: bool
    """Whether any adapter here has a part in the embedding or the head."""

    # Sampling: requests[i] for i in sampled get a token, from the logits of logits_rows. The
    # device keeps the last sampled token of each slot, for the token_slots of later steps.
    sampled: Int64Array  # [L]
    sampled_slots: Int32Array  # [L], no slot twice
    logits_rows: Int64Array  # [L]
    sampling: SamplingBatch
    prompt_logprobs: list[PromptLogprobsSpan]
    pooling: list[PoolingSpan]

    def give_prompt_results(self, result: StepResult) -> None:
        """Pass on to the requests what the step says of their prompts."""
        for scored, logprobs in zip(self.prompt_logprobs, result.prompt_logprobs, strict=True):
            scored.request.prompt_logprobs.extend(logprobs)
        for span, pooled in zip(self.pooling, result.pooled, strict=True):
            assert span.request.pooled is not None
            span.request.pooled.add(pooled, span.num_rows)


@dataclass(slots=True)
class StepResult:
    """What the device gives back."""

    token_ids: list[int]
    """One for each of StepBatch.sampled."""
    logprobs: list[TokenLogprobs | None] | None
    """One for each of StepBatch.sampled; None if nobody asked."""
    prompt_logprobs: list[list[TokenLogprobs]]
    """One for each of StepBatch.prompt_logprobs."""
    pooled: list[npt.NDArray[np.float32]] = field(default_factory=list)
    """[hidden_size], one for each of StepBatch.pooling."""


class PendingStep(Protocol):
    """A step that the device was given."""

    def result(self) -> StepResult:
        """Wait for the step's tokens."""


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """A PendingStep that there is nothing to wait for."""

    _result: StepResult

    def result(self) -> StepResult:
        return self._result
