"""What the front and the core tell each other, on the wire between their processes. No torch."""

from __future__ import annotations

import enum
import math
import time
from typing import Any

import msgspec

from loraplex.engine.errors import RequestError
from loraplex.engine.lora_request import LoRARequest
from loraplex.engine.sampling_params import SamplingParams


class ModelInfo(msgspec.Struct, kw_only=True):
    """What the front needs to know of the model that the core runs."""

    model_name: str
    """How the model is named to users: a hub id, or the last part of a local path."""
    tokenizer_path: str
    """Local directory of the tokenizer."""
    max_model_len: int
    vocab_size: int
    eos_token_ids: list[int]
    dtype: str
    """Of weights and activations, as torch calls it: "bfloat16"."""
    device: str
    """"cpu" or "cuda"."""
    default_sampling: dict[str, Any] = {}
    """The sampling parameters that the model comes with, where they are not SamplingParams'."""


class FinishReason(enum.StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class Service(msgspec.Struct, frozen=True, kw_only=True):
    """Whom a request is for, and how it is served while others wait.

    Raises ValueError for a value that is not allowed.
    """

    tenant: str = ""
    """Service is shared fairly between (tenant, adapter) pairs."""
    weight: float = 1.0
    """A pair of twice the weight gets twice the service."""
    priority: int = 0
    """Requests of one pair are served in this order, the lowest first."""
    max_queue_seconds: float | None = None
    """How long the request may wait for its first turn; None: as the engine is configured."""
    cache_salt: str = ""
    """Cached prefixes are shared among requests of one salt: who does not know it can't learn, from
    how soon an answer comes, what others have asked."""

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight={self.weight} is not allowed: it must be above 0")
        if not -(2**31) <= self.priority < 2**31:
            raise ValueError(f"priority={self.priority} is not allowed: it must have 32 bits")
        seconds = self.max_queue_seconds
        if seconds is not None and not 0 < seconds < math.inf:
            raise ValueError(f"max_queue_seconds={seconds} is not allowed: it must be above 0")


class TokenLogprobs(msgspec.Struct, array_like=True):
    """Log-probabilities at one position: the chosen token first, then the most likely ones."""

    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int]


class AdapterWait(msgspec.Struct, array_like=True):
    """How long a request waited for its adapter before its first turn, in seconds."""

    download: float = 0.0
    """For its version to be known, and its files to be on this machine."""
    host_load: float = 0.0
    """While it was read into host memory."""
    copy: float = 0.0
    """While it was copied to the pool."""


class EngineRequest(msgspec.Struct, kw_only=True):
    """One completion wanted of the engine core (a user's request with n > 1 is n of these)."""

    request_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    """Its `stop`, `bad_words`, `n` and `detokenize` are the front's business: the core knows no
    text."""
    max_tokens: int
    """sampling_params.max_tokens, or what the model's length leaves."""
    eos_token_ids: list[int]
    seed: int
    """The sampling seed: the user's, or one drawn for the request."""
    bad_words_token_ids: list[list[int]] = []
    """sampling_params.bad_words in tokens."""
    lora_request: LoRARequest | None = None
    service: Service = msgspec.field(default_factory=Service)
    arrival_time: float = msgspec.field(default_factory=time.monotonic)
    fetch_seconds: float = 0.0
    """How long it has waited, since then, for its adapter's files."""


class EngineOutput(msgspec.Struct, kw_only=True):
    """What one step gave one request."""

    request_id: str
    new_token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    """One entry for each of new_token_ids, where the request asked for logprobs."""
    prompt_logprobs: list[TokenLogprobs] | None = None
    """For prompt tokens 1..end (the first has none), in the output in which prefill ended."""
    embedding: bytes | None = None
    """Of a request with pooling, in the same output: float32 [hidden_size]."""
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    num_cached_tokens: int = 0
    first_scheduled_time: float = 0.0
    adapter_wait: AdapterWait | None = None
    error: str | None = None
    """With finish_reason "error": what was wrong, in words for the user."""
    error_status: int = 500
    """The HTTP status that fits the error: 400 for the user's mistake, 404 not found, 500 ours."""
    retry_after: float | None = None
    """Seconds after which the same request may succeed, where that is known."""


def refusal(request: EngineRequest, error: RequestError) -> EngineOutput:
    """The output of a request that the core did not take."""
    return EngineOutput(
        request_id=request.request_id,
        new_token_ids=[],
        finish_reason=FinishReason.ERROR,
        error=str(error),
        error_status=error.status,
        retry_after=error.retry_after,
    )
