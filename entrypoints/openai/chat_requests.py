"""Conversations in bodies, and the body of a chat, with vLLM's additions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from loraplex.engine.sampling_params import SamplingParams
from loraplex.engine.text.conversation import join_text_parts
from loraplex.entrypoints.http.strict_model import StrictModel
from loraplex.entrypoints.openai.requests import NEUTRAL_VALUES, GenerationRequest
from loraplex.entrypoints.openai.tools import NamedToolChoice, ToolCallOfMessage, ToolDefinition

NEUTRAL_CHAT_VALUES = {
    **NEUTRAL_VALUES,
    "add_special_tokens": (False,),
    "audio": (),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": ("none",),
    "return_prompt_text": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
NEUTRAL_MESSAGE_VALUES: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "refusal": (),
}


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


class Conversation(StrictModel):
    """Messages, and what a chat template makes a prompt of beside them."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    tools: list[ToolDefinition] | None = None
    documents: list[dict[str, Any]] | None = None
    """Texts to answer from, for templates that show them."""
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: Annotated[str, Field(min_length=1)] | None = None
    """Jinja, instead of the model's or adapter's own; only where the server trusts requests."""
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def check_template(self) -> Self:
        if reserved := RESERVED_TEMPLATE_NAMES & (self.chat_template_kwargs or {}).keys():
            raise ValueError(f"chat_template_kwargs must not have {', '.join(sorted(reserved))}")
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError(
                "continue_final_message is not allowed together with add_generation_prompt"
            )
        return self

    @property
    def offered_tools(self) -> list[ToolDefinition]:
        """Those that the model may call."""
        return self.tools or []

    @property
    def opens_answer(self) -> bool:
        """Whether the prompt ends with the beginning of an answer."""
        return self.add_generation_prompt is not False and not self.continue_final_message

    def template_options(self) -> dict[str, Any]:
        """What the chat template is given beside the messages."""
        options = dict(self.chat_template_kwargs or {})
        if self.continue_final_message:
            options["continue_final_message"] = True
        if self.documents:
            options["documents"] = self.documents
        if self.offered_tools:
            options["tools"] = [tool.for_template() for tool in self.offered_tools]
        return options


class ChatCompletionRequest(Conversation, GenerationRequest):
    """Body of POST /v1/chat/completions."""

    neutral_values = NEUTRAL_CHAT_VALUES

    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None

    @model_validator(mode="after")
    def check_chat(self) -> ChatCompletionRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is only allowed with logprobs=True")
        return self

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

    @property
    def most_tokens(self) -> int | None:
        """max_tokens, by either name."""
        most = self.max_completion_tokens
        return self.max_tokens if most is None else most

    def sampling_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """`defaults` are the model's own. Raises ValueError for a value that is not allowed."""
        return self._sampling_params(
            defaults,
            max_tokens=self.most_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )
