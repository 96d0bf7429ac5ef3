"""The bodies that OpenAI's routes take, with vLLM's additions, and what they ask of the engine.

A field that is not honoured is refused by name, unless its value asks for what happens anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from loraplex.engine.beam_search import MAX_BEAM_WIDTH
from loraplex.engine.errors import describe
from loraplex.engine.lora_request import LoRARequest
from loraplex.engine.messages import Service
from loraplex.engine.sampling_params import SamplingParams
from loraplex.engine.structured_outputs.params import StructuredOutputsParams
from loraplex.entrypoints.http.model_registry import ModelRegistry
from loraplex.entrypoints.http.strict_model import StrictModel
from loraplex.entrypoints.openai.structure import ResponseFormat, StructuredOutputs

# Fields about bookkeeping on OpenAI's side. They change no token, so any value may come.
IGNORED_FIELDS = frozenset(
    {
        "metadata",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "session_id",
        "store",
        "user",
    }
)
# Fields that are not supported, with the values that ask for nothing.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "ec_transfer_params": (),
    "kv_transfer_params": (),
    "logits_processors": ([],),
    "logprob_token_ids": ([],),
    "prompt_embeds": (),
    "repetition_detection": (),
    "return_weight_versions": (False,),
    "routed_experts_prompt_start": (),
    "service_tier": ("auto", "default"),
    "spaces_between_special_tokens": (True,),
    "stream_interval": (1,),
    "thinking_token_budget": (),
    "vllm_xargs": ({},),
    "watermarking": (False,),
}
NEUTRAL_COMPLETION_VALUES = {**NEUTRAL_VALUES, "suffix": ("",)}


# What may be there beside use_beam_search.
BEAM_SEARCH_FIELDS = {
    "adapter_source", "add_generation_prompt", "add_special_tokens", "api_token", "cache_salt",
    "chat_template", "chat_template_kwargs", "continue_final_message", "documents", "ignore_eos",
    "length_penalty", "max_completion_tokens", "max_queue_seconds", "max_tokens", "messages",
    "model", "n", "priority", "prompt", "request_id", "return_token_ids", "temperature",
    "truncate_prompt_tokens", "truncation_side", "use_beam_search",
}  # fmt: skip


class StreamOptions(StrictModel):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """vLLM's: with include_usage, every chunk has the counts so far."""
    include_obfuscation: bool | None = None
    """Padding against listeners who know lengths; false is what happens."""

    @model_validator(mode="after")
    def refuse_obfuscation(self) -> StreamOptions:
        if self.include_obfuscation:
            raise ValueError("include_obfuscation=True is not supported")
        return self


def one_or_several(value: Any) -> Any:
    """A string, where a list of them is wanted, is a list of one."""
    return [value] if isinstance(value, str) else value


def token_id_keys(value: Any) -> Any:
    """JSON's keys are strings, token ids are integers."""
    if not isinstance(value, dict):
        return value
    for key in value:
        if not (isinstance(key, str) and key.isdecimal()):
            raise ValueError(f"the key {key!r} must be a token id")
    return {int(key): bias for key, bias in value.items()}


class ModelRequest(StrictModel):
    """What every body says of the model that it is for."""

    model: str
    """The base model, an adapter by its name or, where the server allows that, by its source."""
    adapter_source: str | None = None
    """LoRAX's: where the adapter is, instead of a scheme in `model`."""
    api_token: str | None = Field(default=None, repr=False)
    """LoRAX's: reads the hub for an adapter by its source."""

    def find_adapter(self, models: ModelRegistry) -> LoRARequest | None:
        """As ModelRegistry.resolve."""
        return models.resolve(self.model, self.adapter_source, self.api_token)


class GenerationRequest(ModelRequest):
    """What completions and chats have in common. None stands for the default."""

    ignored_fields = IGNORED_FIELDS

    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: Annotated[list[str] | None, BeforeValidator(one_or_several)] = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    logit_bias: Annotated[dict[int, float] | None, BeforeValidator(token_id_keys)] = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: int | None = None
    use_beam_search: bool | None = None
    """Give the n likeliest sequences instead of drawn ones."""
    length_penalty: float | None = None
    """Of beam search: larger values favour longer sequences."""
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None
    """Keep so many of the prompt's tokens; -1: as many as leave room for max_tokens."""
    truncation_side: Literal["left", "right"] | None = None
    """Where the others are: the last tokens are kept by default, the first with "right"."""
    return_token_ids: bool | None = None
    """Give the tokens of prompt and output in numbers, too."""
    return_tokens_as_token_ids: bool | None = None
    """Name the tokens of logprobs by their numbers: "token_id:7"."""
    request_id: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """Ends the answer's id."""
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    """Cached prefixes are shared among the requests of one salt only."""
    priority: int | None = None
    max_queue_seconds: float | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    SAMPLING_FIELDS: ClassVar[tuple[str, ...]] = (
        "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
        "repetition_penalty", "seed", "stop", "stop_token_ids", "include_stop_str_in_output",
        "min_tokens", "ignore_eos", "skip_special_tokens", "logit_bias", "allowed_token_ids",
        "bad_words", "prompt_logprobs",
    )  # fmt: skip

    @model_validator(mode="after")
    def check_stream(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed with stream=True")
        if self.stream and self.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs is not allowed with stream=True")
        return self

    @model_validator(mode="after")
    def check_beam_search(self) -> GenerationRequest:
        if not self.use_beam_search:
            if self.length_penalty not in (None, 1.0):
                raise ValueError("length_penalty is only allowed with use_beam_search=True")
            return self
        for name in sorted(self.model_fields_set - BEAM_SEARCH_FIELDS):
            value = getattr(self, name)
            if value is not None and value is not False:
                raise ValueError(f"{name} is not allowed together with use_beam_search")
        if self.temperature not in (None, 0):
            raise ValueError(
                f"temperature={self.temperature} is not allowed together with use_beam_search: it "
                "must be 0"
            )
        if (self.n or 1) > MAX_BEAM_WIDTH:
            raise ValueError(
                f"n={self.n} is not allowed together with use_beam_search: it must be 1 to "
                f"{MAX_BEAM_WIDTH}"
            )
        return self

    @property
    def beam_length_penalty(self) -> float | None:
        """None without beam search."""
        if not self.use_beam_search:
            return None
        return 1.0 if self.length_penalty is None else self.length_penalty

    @model_validator(mode="after")
    def check_truncation(self) -> GenerationRequest:
        if self.truncate_prompt_tokens == 0:
            raise ValueError("truncate_prompt_tokens=0 is not allowed: it must be 1 or more, or -1")
        if self.truncation_side is not None and self.truncate_prompt_tokens is None:
            raise ValueError("truncation_side is only allowed with truncate_prompt_tokens")
        return self

    @model_validator(mode="after")
    def check_structure(self) -> GenerationRequest:
        if self.structured_outputs is not None and self.response_format is not None:
            raise ValueError("structured_outputs is not allowed together with response_format")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def counts_in_chunks(self) -> bool:
        """Whether every chunk of a stream has the token counts so far."""
        return self.include_usage and bool(
            self.stream_options and self.stream_options.continuous_usage_stats
        )

    def service(self) -> Service:
        """Raises ValueError for a value that is not allowed."""
        return Service(
            priority=self.priority or 0,
            max_queue_seconds=self.max_queue_seconds,
            cache_salt=self.cache_salt or "",
        )

    def truncate(self, prompt: list[int], max_model_len: int, max_tokens: int | None) -> list[int]:
        """What truncate_prompt_tokens leaves of a prompt."""
        most = self.truncate_prompt_tokens
        if most is None:
            return prompt
        if most == -1:
            most = max(1, max_model_len - (max_tokens or 1))
        return prompt[:most] if self.truncation_side == "right" else prompt[-most:]

    def _structure(self) -> StructuredOutputsParams | None:
        """Raises ValueError for what is not allowed."""
        if self.structured_outputs is not None:
            return self.structured_outputs.params()
        return None if self.response_format is None else self.response_format.structured_outputs()

    def _sampling_params(self, defaults: Mapping[str, Any], **options: Any) -> SamplingParams:
        options.setdefault("structured_outputs", self._structure())
        named = {name: getattr(self, name) for name in self.SAMPLING_FIELDS}
        given = {name: value for name, value in named.items() if value is not None}
        return SamplingParams(**{**defaults, **given, **options})


def parse_prompts(value: Any) -> list[str | list[int]]:
    """The prompts of a completion: a text, token ids, or a list of one of these."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(type(item) is int for item in value):
            return [value]
        if all(isinstance(item, str) for item in value):
            return value
        if all(isinstance(p, list) and p and all(type(t) is int for t in p) for p in value):
            return value
    raise ValueError(
        f"prompt={describe(value)} is not allowed: it must be a string, token ids, or a "
        "non-empty list of strings or of token ids"
    )


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    neutral_values = NEUTRAL_COMPLETION_VALUES

    prompt: Annotated[list[str | list[int]], BeforeValidator(parse_prompts)]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    max_tokens: int | None = None
    add_special_tokens: bool | None = None

    @model_validator(mode="after")
    def check_best_of(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise ValueError(f"best_of={self.best_of} must be at least n={self.n or 1}")
        if self.chooses and self.stream:
            raise ValueError("best_of is not allowed with stream=True unless it equals n")
        return self

    @property
    def chooses(self) -> bool:
        """Whether more completions are made than given back."""
        return self.best_of is not None and self.best_of > (self.n or 1)

    @property
    def scores_prompt_only(self) -> bool:
        """max_tokens=0 with echo: nothing is generated, the prompt's log-probabilities are wanted.

        The engine always generates a token, which is then left out.
        """
        return self.max_tokens == 0 and bool(self.echo)

    def sampling_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """`defaults` are the model's own. Raises ValueError for a value that is not allowed."""
        options: dict[str, Any] = {"logprobs": self.logprobs}
        if self.chooses:
            options |= {"n": self.best_of, "logprobs": self.logprobs or 0}
        if self.max_tokens is not None:
            options["max_tokens"] = 1 if self.scores_prompt_only else self.max_tokens
        if self.echo and self.logprobs is not None and self.prompt_logprobs is None:
            options["prompt_logprobs"] = self.logprobs
        return self._sampling_params(defaults, **options)
