"""The bodies that OpenAI's routes take, with vLLM's additions, and what they ask of the engine.

A field that is not honoured is refused by name, unless its value asks for what happens anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from loraplex.engine.errors import describe
from loraplex.engine.messages import Service
from loraplex.engine.sampling_params import SamplingParams
from loraplex.engine.structured_outputs.params import StructuredOutputsParams
from loraplex.entrypoints.http.strict_model import StrictModel
from loraplex.entrypoints.openai.structure import ResponseFormat, StructuredOutputs
from loraplex.entrypoints.openai.tools import NamedToolChoice, ToolCallOfMessage, ToolDefinition

# Fields about bookkeeping on OpenAI's side. They change no token, so any value may come.
IGNORED_FIELDS = frozenset(
    {"user", "metadata", "store", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
)
# Fields that are not supported, with the values that ask for nothing.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "length_penalty": (1.0,),
    "service_tier": ("auto", "default"),
    "spaces_between_special_tokens": (True,),
    "use_beam_search": (False,),
}
NEUTRAL_COMPLETION_VALUES = {**NEUTRAL_VALUES, "suffix": ("",)}
NEUTRAL_CHAT_VALUES = {
    **NEUTRAL_VALUES,
    "add_special_tokens": (False,),
    "audio": (),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
}
NEUTRAL_MESSAGE_VALUES: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "refusal": (),
}


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


class GenerationRequest(StrictModel):
    """What completions and chats have in common. None stands for the default."""

    ignored_fields = IGNORED_FIELDS

    model: str
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
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    truncate_prompt_tokens: Annotated[int | None, Field(ge=1)] = None
    """Keep so many of the prompt's tokens, the last ones."""
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
        return Service(priority=self.priority or 0, max_queue_seconds=self.max_queue_seconds)

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


def join_text_parts(value: Any) -> Any:
    """The text of a message whose content comes in parts."""
    if not isinstance(value, list):
        return value
    for part in value:
        if not (isinstance(part, dict) and part.keys() == {"type", "text"}):
            raise ValueError(f"the part {describe(part)} is not supported: it must be a text part")
        if part["type"] != "text" or not isinstance(part["text"], str):
            raise ValueError(f"the part {describe(part)} is not supported: it must be a text part")
    return "\n".join(part["text"] for part in value)


class ChatMessage(StrictModel):
    neutral_values = NEUTRAL_MESSAGE_VALUES

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(join_text_parts)] = None
    name: str | None = None
    tool_calls: list[ToolCallOfMessage] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    """Another name of the same."""

    @model_validator(mode="after")
    def check_role(self) -> ChatMessage:
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls is only allowed with role='assistant'")
        return self

    def for_template(self) -> dict[str, Any]:
        """As chat templates know messages: they have not heard of developers."""
        message = {
            "role": "system" if self.role == "developer" else self.role,
            "content": self.content or "",
            "name": self.name,
            "tool_call_id": self.tool_call_id,
            "tool_calls": [call.for_template() for call in self.tool_calls or []] or None,
            "reasoning_content": self.reasoning or self.reasoning_content,
        }
        return {name: value for name, value in message.items() if value is not None}


# What the tokenizer's own chat method takes, which is not the template's.
RESERVED_TEMPLATE_NAMES = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "documents",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }  # fmt: skip
)


class ChatCompletionRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    neutral_values = NEUTRAL_CHAT_VALUES

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: list[ToolDefinition] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def check_chat(self) -> ChatCompletionRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is only allowed with logprobs=True")
        if reserved := RESERVED_TEMPLATE_NAMES & (self.chat_template_kwargs or {}).keys():
            raise ValueError(f"chat_template_kwargs must not have {', '.join(sorted(reserved))}")
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError(
                "continue_final_message is not allowed together with add_generation_prompt"
            )
        return self

    def template_options(self) -> dict[str, Any]:
        """What the chat template is given beside the messages."""
        options = dict(self.chat_template_kwargs or {})
        if self.continue_final_message:
            options["continue_final_message"] = True
        if self.offered_tools:
            options["tools"] = [tool.for_template() for tool in self.offered_tools]
        return options

    @property
    def opens_answer(self) -> bool:
        """Whether the prompt ends with the beginning of an answer."""
        return self.add_generation_prompt is not False and not self.continue_final_message

    @model_validator(mode="after")
    def check_tools(self) -> ChatCompletionRequest:
        names = [tool.function.name for tool in self.tools or []]
        if len(set(names)) < len(names):
            raise ValueError("tools must have different names")
        if self.tool_choice not in (None, "none", "auto") and not names:
            raise ValueError("tool_choice is only allowed with tools")
        named = self.tool_choice
        if isinstance(named, NamedToolChoice) and named.function.name not in names:
            raise ValueError(f"tool_choice={named.function.name!r} must be one of {names}")
        if self.forced_tools and self._structure() is not None:
            raise ValueError(
                "tool_choice is not allowed together with response_format or structured_outputs"
            )
        return self

    @property
    def offered_tools(self) -> list[ToolDefinition]:
        """Those that the model may call."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def forced_tools(self) -> list[ToolDefinition]:
        """Those of which the model must call one; none if it need not."""
        if isinstance(self.tool_choice, NamedToolChoice):
            name = self.tool_choice.function.name
            return [tool for tool in self.tools or [] if tool.function.name == name]
        return self.offered_tools if self.tool_choice == "required" else []

    @property
    def is_parallel(self) -> bool:
        """Whether several tools may be called at once, where one must be."""
        is_named = isinstance(self.tool_choice, NamedToolChoice)
        return self.parallel_tool_calls is not False and not is_named

    def sampling_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """`defaults` are the model's own. Raises ValueError for a value that is not allowed."""
        max_tokens = self.max_completion_tokens
        return self._sampling_params(
            defaults,
            max_tokens=self.max_tokens if max_tokens is None else max_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )
