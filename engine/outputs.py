"""What users get back. Pure data."""

from __future__ import annotations

from dataclasses import dataclass, field

from loraplex.engine.lora_request import LoRARequest


@dataclass(slots=True)
class Logprob:
    """Log-probability of a token before temperature and penalties; rank 1 is the likeliest."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a prompt."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    """"stop" (end of sequence, stop token or stop string), "length", "abort", "error", or None."""
    stop_reason: int | str | None = None
    """The stop token id or stop string that ended it; None for the end-of-sequence token."""


@dataclass(slots=True)
class EmbeddingOutput:
    embedding: list[float]
    """Of length 1."""


@dataclass(slots=True)
class EmbeddingRequestOutput:
    """A prompt and its embedding."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: EmbeddingOutput
    finished: bool = True


@dataclass(slots=True)
class RequestMetrics:
    """When things happened, in seconds of time.monotonic(); 0.0 for what has not happened."""

    arrival_time: float = 0.0
    first_scheduled_time: float = 0.0
    first_token_time: float = 0.0
    finished_time: float = 0.0
    download_seconds: float = 0.0
    """Of the time before the first turn: until the adapter's version was known, and its files were
    on this machine."""
    host_load_seconds: float = 0.0
    """... while the adapter was read into host memory."""
    copy_seconds: float = 0.0
    """... while the adapter was copied to the pool."""

    @property
    def queue_seconds(self) -> float:
        """The rest of the time before the first turn."""
        waited = self.first_scheduled_time - self.arrival_time
        return waited - self.download_seconds - self.host_load_seconds - self.copy_seconds

    @property
    def prefill_seconds(self) -> float:
        """From the first turn to the first token."""
        return self.first_token_time - self.first_scheduled_time


@dataclass(slots=True)
class RequestOutput:
    """A request and its completions so far."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    lora_request: LoRARequest | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    error: Exception | None = None
    embedding: list[float] | None = None
    """Of a request with pooling."""
