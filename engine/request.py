"""The vocabulary of the engine: what a request is, on the wire and inside the core. No torch."""

from __future__ import annotations

import enum
import math
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import msgspec

from loraplex.engine.pooling import PooledPrompt
from loraplex.engine.sampling_params import SamplingParams
from loraplex.lora.recipe import Merge, is_finite_number

if TYPE_CHECKING:
    from loraplex.engine.adapters.manager import Adapter
    from loraplex.engine.structured_outputs.grammar import Grammar


@dataclass(frozen=True)
class LoRARequest:
    """Names an adapter: the name is what users and metrics see, the path where it comes from.

    Several adapters may be used as one, by merged_adapters instead of a path.
    Raises ValueError naming the field, its value and what is allowed.
    """

    lora_name: str
    lora_path: str = ""
    """A directory, hub:owner/name[@revision][/subfolder] or s3://bucket/prefix; see
    loraplex.lora.sources.reference."""
    merged_adapters: MergedAdapters | None = None
    scale: float = 1.0
    """What the adapter adds to the base model is multiplied by this. An adapter of another scale
    takes memory of its own."""
    token: str | None = field(default=None, repr=False)
    """Reads the hub for this request: what it may not read is not served, cached or not. None: the
    engine's own."""

    def __post_init__(self) -> None:
        for name in ("lora_name", "lora_path"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise ValueError(f"{name}={describe(value)} is not allowed: it must be a string")
        if not isinstance(self.token, str | None):
            raise ValueError("token=... is not allowed: it must be a string, or None")
        if not self.lora_name:
            raise ValueError("lora_name='' is not allowed: an adapter needs a name")
        if bool(self.lora_path) == (self.merged_adapters is not None):
            raise ValueError(
                f"lora_path={self.lora_path!r} of adapter {self.lora_name!r} is not allowed: "
                "give a directory that holds adapter_config.json, a hub id or s3://bucket/prefix, "
                "or else merged_adapters"
            )
        if not isinstance(self.merged_adapters, MergedAdapters | None):
            raise ValueError(
                f"merged_adapters={describe(self.merged_adapters)} is not allowed: it must be "
                "MergedAdapters, or None"
            )
        if not is_finite_number(self.scale):
            raise ValueError(
                f"scale={describe(self.scale)} of adapter {self.lora_name!r} is not allowed: it "
                "must be a finite number"
            )

    @property
    def parts(self) -> tuple[LoRARequest, ...]:
        """The adapters to read: itself, or those it merges, with its token where they have none."""
        if self.merged_adapters is None:
            return (self,)
        parts = self.merged_adapters.adapters
        return tuple(replace(part, token=part.token or self.token) for part in parts)

    @property
    def merge(self) -> Merge | None:
        """What becomes of the parts, with the scale; None: the only one is taken as it is."""
        if self.merged_adapters is not None:
            return self.merged_adapters.scaled(self.scale)
        return None if self.scale == 1 else Merge(weights=(self.scale,))


@dataclass(frozen=True, kw_only=True)
class MergedAdapters(Merge):
    """Adapters that become one, as PEFT's add_weighted_adapter merges them."""

    adapters: tuple[LoRARequest, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        is_list = isinstance(self.adapters, list | tuple)
        if not is_list or not all(isinstance(part, LoRARequest) for part in self.adapters):
            raise ValueError(
                f"adapters={describe(self.adapters)} is not allowed: it must be a list of "
                "LoRARequests"
            )
        object.__setattr__(self, "adapters", tuple(self.adapters))
        if len(self.adapters) != len(self.weights):
            raise ValueError(
                f"weights={self.weights} is not allowed: it must have one weight for each of the "
                f"{len(self.adapters)} adapters"
            )
        for adapter in self.adapters:
            if adapter.merge is not None:
                raise ValueError(
                    f"merged_adapters with {adapter.lora_name!r} is not allowed: an adapter that "
                    "is merged must have scale=1 and merge none itself; use weights"
                )

    def scaled(self, scale: float) -> Merge:
        """How the adapters are merged, for a multiple of the result."""
        return Merge(
            weights=tuple(scale * weight for weight in self.weights),
            strategy=self.strategy,
            density=self.density,
            majority_sign_method=self.majority_sign_method,
            seed=self.seed,
        )


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


# What service costs. A generated token needs a pass over the weights of its own, a prompt token
# shares one.
PROMPT_TOKEN_COST = 1
OUTPUT_TOKEN_COST = 2


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

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight={self.weight} is not allowed: it must be above 0")
        if not -(2**31) <= self.priority < 2**31:
            raise ValueError(f"priority={self.priority} is not allowed: it must have 32 bits")
        seconds = self.max_queue_seconds
        if seconds is not None and not 0 < seconds < math.inf:
            raise ValueError(f"max_queue_seconds={seconds} is not allowed: it must be above 0")


class EngineRequest(msgspec.Struct, kw_only=True):
    """One completion wanted of the engine core (a user's request with n > 1 is n of these)."""

    request_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    """Its `stop`, `n` and `detokenize` are the front's business: the core knows no text."""
    max_tokens: int
    """sampling_params.max_tokens, or what the model's length leaves."""
    eos_token_ids: list[int]
    seed: int
    """The sampling seed: the user's, or one drawn for the request."""
    lora_request: LoRARequest | None = None
    service: Service = msgspec.field(default_factory=Service)
    arrival_time: float = msgspec.field(default_factory=time.monotonic)


class TokenLogprobs(msgspec.Struct, array_like=True):
    """Log-probabilities at one position: the chosen token first, then the most likely ones."""

    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int]


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


class AdapterWait(msgspec.Struct, array_like=True):
    """How long a request waited for its adapter before its first turn, in seconds."""

    download: float = 0.0
    """For its version to be known, and its files to be on this machine."""
    host_load: float = 0.0
    """While it was read into host memory."""
    copy: float = 0.0
    """While it was copied to the pool."""


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
        self, wire: EngineRequest, adapter: Adapter | None = None, grammar: Grammar | None = None
    ) -> None:
        params = wire.sampling_params
        self.wire = wire
        self.adapter = adapter
        """None for the base model, and while it is not known which version is meant."""
        # The first token that the adapter acts on; from none on, if it is the number of all tokens
        # that there may be. Known when the adapter is in the pool.
        self.adapter_start = 0
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
            waited = self.entered_time, now
            wait.host_load = _overlap(waited, self.adapter.read_interval)
            wait.copy = _overlap(waited, self.adapter.copy_interval)

    def find_adapter_start(self) -> None:
        """Called when the adapter is in the pool."""
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


class RequestError(ValueError):
    """A request failed for a reason of its own; `status` is the HTTP status that fits, retry_after
    the seconds to wait before trying again, where that may help."""

    def __init__(self, message: str, status: int = 400, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


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


def describe(value: Any, limit: int = 200) -> str:
    """A value as an error message shows it: its repr, cut where it gets long."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
