"""A request inside the core: where it stands, and what it holds. No torch."""

from __future__ import annotations

import enum
import time
from typing import TYPE_CHECKING

from loraplex.engine.errors import RequestError
from loraplex.engine.messages import (
    AdapterWait,
    EngineOutput,
    EngineRequest,
    FinishReason,
    TokenLogprobs,
)
from loraplex.engine.pooling import PooledPrompt

if TYPE_CHECKING:
    from loraplex.engine.adapters.manager import Adapter
    from loraplex.engine.structured_outputs.grammar import Grammar


# What service costs. A generated token needs a pass over the weights of its own, a prompt token
# shares one.
PROMPT_TOKEN_COST = 1
OUTPUT_TOKEN_COST = 2


class RequestStatus(enum.Enum):
    FETCHING = enum.auto()
    """Its adapter's version is asked for at its source, or its files are on their way here."""
    COMPILING = enum.auto()
    """Its grammar is not ready; it is in no queue, so that nobody waits behind it."""
    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


class Request:
    """A request inside the core.

    Every request has num_tokens and num_computed_tokens, and each step moves the second towards
    the first. Both count what steps in flight will have done: num_computed_tokens the tokens that
    they compute, num_tokens the ones that they sample, which follow those in all_token_ids.
    """

    __slots__ = (
        "adapter",
        "adapter_start",
        "adapter_wait",
        "all_token_ids",
        "block_hashes",
        "block_table",
        "first_scheduled_time",
        "grammar",
        "max_num_tokens",
        "entered_time",
        "num_cached_tokens",
        "num_added_tokens",
        "num_computed_tokens",
        "num_keyed_blocks",
        "num_preemptions",
        "num_prompt_tokens",
        "num_scored_tokens",
        "num_tokens",
        "pooled",
        "prompt_logprobs",
        "slot",
        "status",
        "stop_token_ids",
        "wire",
    )

    def __init__(
        self,
        wire: EngineRequest,
        adapter: Adapter | None = None,
        grammar: Grammar | None = None,
        num_added_tokens: int = 0,
    ) -> None:
        params = wire.sampling_params
        self.wire = wire
        self.adapter = adapter
        """None for the base model, and while it is not known which version is meant."""
        # The first token that the adapter acts on; from none on, if it is the number of all tokens
        # that there may be. Known when the adapter is in the pool.
        self.adapter_start = 0
        # Beyond the base model's, so many at least must the adapter have for the prompt.
        self.num_added_tokens = num_added_tokens
        self.grammar = grammar
        self.status = RequestStatus.WAITING
        self.all_token_ids = list(wire.prompt_token_ids)
        self.num_prompt_tokens = len(wire.prompt_token_ids)
        self.max_num_tokens = self.num_prompt_tokens + wire.max_tokens
        self.num_tokens = self.num_prompt_tokens
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.entered_time = self.first_scheduled_time = 0.0
        self.adapter_wait: AdapterWait | None = None
        self.prompt_logprobs: list[TokenLogprobs] = []
        # Prompt tokens that launched steps score: prompt_logprobs has them or will have.
        self.num_scored_tokens = 0
        pooling = params.pooling
        self.pooled = None if pooling is None else PooledPrompt(pooling, self.num_prompt_tokens)
        self.stop_token_ids = frozenset(params.stop_token_ids)
        # The KV manager's: the pages of its tokens, and the keys of its full blocks.
        self.block_table: list[int] = []
        self.block_hashes: list[bytes] = []
        self.num_keyed_blocks = 0
        # The input batch's: its row there while it runs.
        self.slot = -1

    @property
    def request_id(self) -> str:
        return self.wire.request_id

    @property
    def num_pending_tokens(self) -> int:
        """Tokens on their way: sampled by steps whose results are not known yet."""
        return self.num_tokens - len(self.all_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Without those on their way."""
        return len(self.all_token_ids) - self.num_prompt_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.wire.sampling_params.prompt_logprobs is not None

    @property
    def adapter_name(self) -> str:
        """Empty for the base model."""
        return "" if self.wire.lora_request is None else self.wire.lora_request.lora_name

    @property
    def adapter_version(self) -> bytes:
        """Empty for the base model."""
        return b"" if self.adapter is None else self.adapter.version

    def chunk(self, num_computed_tokens: int, budget: int) -> int:
        """Tokens to compute next, at most. None of the base model's together with the adapter's."""
        end = self.num_tokens
        if num_computed_tokens < self.adapter_start:
            end = min(end, self.adapter_start)
        return min(end - num_computed_tokens, budget)

    def note_first_turn(self) -> None:
        """It runs from now on, for the first time, after waiting since entered_time."""
        self.first_scheduled_time = now = time.monotonic()
        if self.adapter is not None:
            wait = self.adapter_wait = self.adapter_wait or AdapterWait()
            wait.download += self.wire.fetch_seconds
            waited = self.entered_time, now
            wait.host_load = _overlap(waited, self.adapter.read_interval)
            wait.copy = _overlap(waited, self.adapter.copy_interval)

    def meet_adapter(self) -> None:
        """Called when the adapter, if it has one, is in the pool. Raises RequestError for a prompt
        with tokens that it does not have."""
        traits = None if self.adapter is None else self.adapter.traits
        num_known = 0 if traits is None else traits.num_added_tokens
        if self.num_added_tokens > num_known:
            raise RequestError(
                f"token id {max(self.wire.prompt_token_ids)} in prompt is not allowed: it is "
                f"{self.num_added_tokens} beyond the base model's vocabulary, to which the adapter "
                f"{self.adapter_name!r} adds {num_known} tokens"
            )
        if self.adapter is not None:
            start = self.adapter.traits.first_token(self.wire.prompt_token_ids)
            self.adapter_start = self.max_num_tokens if start is None else start

    @property
    def service_key(self) -> tuple[str, bytes]:
        """Whose service counter this request is charged to."""
        return self.wire.service.tenant, self.adapter_version

    @property
    def queued_service(self) -> float:
        """The most service that it may still ask for, as its queue counts it."""
        service = PROMPT_TOKEN_COST * self.num_prompt_tokens
        return service + OUTPUT_TOKEN_COST * (self.max_num_tokens - len(self.all_token_ids))

    def finish_reason_at(self, token_id: int) -> tuple[FinishReason | None, int | None]:
        """Whether the token just appended ends the request: (finish_reason, stop_reason)."""
        params, num_output_tokens = self.wire.sampling_params, self.num_output_tokens
        if num_output_tokens >= params.min_tokens:
            if token_id in self.stop_token_ids:
                return FinishReason.STOP, token_id
            if token_id in self.wire.eos_token_ids and not params.ignore_eos:
                return FinishReason.STOP, None
        if num_output_tokens >= self.wire.max_tokens:
            return FinishReason.LENGTH, None
        return None, None

    def forget_pending(self) -> None:
        """The steps in flight come to nothing."""
        self.num_tokens = len(self.all_token_ids)
        self.num_scored_tokens = len(self.prompt_logprobs)
        if self.pooled is not None:
            self.pooled.forget_pending()

    def make_output(self, finish_reason: FinishReason | None) -> EngineOutput:
        """An output without tokens; the first ones say what is known since the start."""
        output = EngineOutput(
            request_id=self.request_id, new_token_ids=[], finish_reason=finish_reason
        )
        if self.num_output_tokens <= 1:
            output.num_cached_tokens = self.num_cached_tokens
            output.first_scheduled_time = self.first_scheduled_time
            output.adapter_wait = self.adapter_wait
            if self.wants_prompt_logprobs:
                output.prompt_logprobs = self.prompt_logprobs
            if self.pooled is not None:
                output.embedding = self.pooled.embedding()
        return output

    def make_error_output(self, error: ValueError) -> EngineOutput:
        """The last output of a request that failed."""
        output = self.make_output(FinishReason.ERROR)
        output.error = str(error)
        output.error_status = getattr(error, "status", 400)
        output.retry_after = getattr(error, "retry_after", None)
        return output


def _overlap(a: tuple[float, float], b: tuple[float, float]) -> float:
    return max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
