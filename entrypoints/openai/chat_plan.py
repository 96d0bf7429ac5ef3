"""From the body of a chat to what is asked of the engine, and how the answer will be read."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from loraplex.engine.errors import describe
from loraplex.engine.lora_request import LoRARequest
from loraplex.engine.sampling_params import SamplingParams
from loraplex.engine.structured_outputs.json_schema import check_schema
from loraplex.engine.structured_outputs.params import StructuredOutputsParams
from loraplex.engine.text.tokenizer import Tokenizer
from loraplex.entrypoints.http.serving import Serving
from loraplex.entrypoints.openai.chat_parser import MessageParser
from loraplex.entrypoints.openai.chat_requests import ChatCompletionRequest, Conversation
from loraplex.entrypoints.openai.reasoning_formats import ReasoningFormat, choose_reasoning_format
from loraplex.entrypoints.openai.tool_formats import choose_tool_format
from loraplex.entrypoints.openai.tool_formats.base import ToolFormat

# Tokens at the end of a prompt among which the beginning of the reasoning would be.
NUM_LAST_TOKENS = 8


@dataclass(frozen=True)
class ChatPlan:
    lora_request: LoRARequest | None
    prompt: list[int]
    params: SamplingParams
    tool_format: ToolFormat | None
    tool_names: frozenset[str]
    is_forced: bool
    """Whether nothing but calls of tools may come."""
    reasoning: tuple[ReasoningFormat, bool] | None
    """The format, and whether the answer begins within the reasoning."""

    def make_parser(self) -> MessageParser:
        """For one of the answers."""
        tools = None
        if self.tool_format is not None:
            tools = self.tool_format, self.tool_names, self.is_forced
        return MessageParser(self.reasoning, tools)


async def tokenizer_of(
    serving: Serving, body: Conversation, lora_request: LoRARequest | None
) -> Tokenizer:
    """The one with whose chat template the conversation becomes a prompt. Raises ApiError or
    ValueError."""
    if body.chat_template is not None and not serving.trusts_chat_templates:
        raise ValueError(
            f"chat_template={describe(body.chat_template)} is not allowed: this server does not "
            "take templates of requests (--trust-request-chat-template)"
        )
    tokenizer = await serving.tokenizer_of(lora_request)
    if body.chat_template is not None:
        tokenizer = tokenizer.with_chat_template(body.chat_template)
    if body.documents and "documents" not in tokenizer.chat_template:
        raise ValueError(
            f"documents={describe(body.documents)} is not allowed: the chat template shows none"
        )
    return tokenizer


async def encode_conversation(
    serving: Serving, body: Conversation, tokenizer: Tokenizer
) -> list[int]:
    """The prompt's token ids. Raises ValueError for what the template refuses."""
    messages = [message.for_template() for message in body.messages]
    options = body.template_options()
    if body.chat_template is None:
        return await serving.encode_chat(messages, body.opens_answer, options, tokenizer)
    # Who knows how long it takes: nobody else waits for it.
    encode = partial(tokenizer.apply_chat_template, messages, body.opens_answer, **options)
    return await asyncio.to_thread(encode)


async def plan_chat(serving: Serving, body: ChatCompletionRequest) -> ChatPlan:
    """Raises ApiError or ValueError for what can be refused at once."""
    lora_request = body.find_adapter(serving.models)
    tokenizer = await tokenizer_of(serving, body, lora_request)
    tools, tool_format = body.offered_tools, None
    if tools:
        tool_format = choose_tool_format(serving.tool_call_parser, tokenizer.chat_template)
    prompt = await encode_conversation(serving, body, tokenizer)
    prompt = body.truncate(prompt, serving.engine.model_info.max_model_len, body.most_tokens)
    reasoning = _reasoning(serving.reasoning_parser, tokenizer, prompt)
    params = body.sampling_params(serving.engine.model_info.default_sampling)
    answer = _answer_format(body, params, tool_format, has_reasoning=reasoning is not None)
    if answer is not None:
        if reasoning is not None:
            reasoning_format, is_open = reasoning
            answer = reasoning_format.structural_tag(is_open, answer)
        tag = {"type": "structural_tag", "format": answer}
        params = replace(params, structured_outputs=StructuredOutputsParams(structural_tag=tag))
    if tool_format is not None:
        if tool_format.special_tokens:
            params = replace(params, skip_special_tokens=False)
        if body.forced_tools and reasoning is None:
            prompt += tokenizer.encode(tool_format.opening, add_special_tokens=False)
    return ChatPlan(
        lora_request=lora_request,
        prompt=prompt,
        params=params,
        tool_format=tool_format,
        tool_names=frozenset(tool.function.name for tool in tools),
        is_forced=bool(body.forced_tools),
        reasoning=reasoning,
    )


def _reasoning(
    name: str, tokenizer: Tokenizer, prompt: list[int]
) -> tuple[ReasoningFormat, bool] | None:
    reasoning_format = choose_reasoning_format(name, tokenizer.chat_template)
    if reasoning_format is None:
        return None
    prompt_end = tokenizer.decode(prompt[-NUM_LAST_TOKENS:], skip_special_tokens=False)
    return reasoning_format, reasoning_format.is_open(prompt_end)


def _answer_format(
    body: ChatCompletionRequest,
    params: SamplingParams,
    tool_format: ToolFormat | None,
    has_reasoning: bool,
) -> dict[str, Any] | None:
    """A structural tag's format, where the parameters don't say already what the answer must be."""
    if body.forced_tools:
        assert tool_format is not None
        tools = [tool.tool() for tool in body.forced_tools]
        for tool in tools:
            check_schema(tool.parameters, f"tools.{tool.name}")
        return tool_format.structural_tag(tools, body.is_parallel)
    if params.structured_outputs is not None and has_reasoning:
        return params.structured_outputs.as_format()
    return None
