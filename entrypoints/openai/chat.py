"""POST /v1/chat/completions: OpenAI's chats over the engine."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec
from fastapi import APIRouter, Request, Response
from msgspec import UNSET

from loraplex.engine.outputs import CompletionOutput, Logprob, RequestOutput
from loraplex.entrypoints.http.serving import Serving
from loraplex.entrypoints.http.streaming import EventStream, json_response, unless_disconnected
from loraplex.entrypoints.openai.chat_parser import MessageParser, Reasoning
from loraplex.entrypoints.openai.chat_plan import ChatPlan, plan_chat
from loraplex.entrypoints.openai.chat_requests import ChatCompletionRequest
from loraplex.entrypoints.openai.common import (
    DeltaTracker,
    count_usage,
    make_heading,
    token_text_of,
)
from loraplex.entrypoints.openai.responses import (
    AssistantMessage,
    CalledFunction,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprob,
    ChatLogprobs,
    ToolCall,
    TopLogprob,
    Usage,
)
from loraplex.entrypoints.openai.tool_formats.base import CallBegin, Content, Event

router = APIRouter()


@router.post("/v1/chat/completions")
async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
    """Answer a conversation."""
    serving: Serving = request.app.state.serving
    answer = ChatAnswer(serving, body, await plan_chat(serving, body))
    if body.stream:
        return EventStream(answer.events())
    return json_response(await unless_disconnected(request.receive, answer.whole()))


class ChatAnswer:
    """The answer to one body, whole or as events.

    Raises ApiError or ValueError for what can be refused at once.
    """

    def __init__(self, serving: Serving, body: ChatCompletionRequest, plan: ChatPlan) -> None:
        self._serving = serving
        self._body = body
        self._plan = plan
        self._service = body.service()
        serving.check_max_tokens(len(plan.prompt), plan.params.max_tokens)
        self._token_text = token_text_of(serving, body)
        self._heading = make_heading("chatcmpl", body)

    async def whole(self) -> ChatCompletion:
        async with aclosing(self._outputs(stream=False)) as outputs:
            async for output in outputs:
                final = output
        answer = ChatCompletion(
            id=self._heading.id,
            created=self._heading.created,
            model=self._heading.model,
            choices=[self._choice(completion) for completion in final.outputs],
            usage=count_usage([final]),
        )
        if self._body.prompt_logprobs is not None:
            answer.prompt_logprobs = final.prompt_logprobs
        if self._body.return_token_ids:
            answer.prompt_token_ids = final.prompt_token_ids
        return answer

    async def events(self) -> AsyncGenerator[bytes, None]:
        encode = msgspec.json.Encoder().encode
        writers = [self._writer() for _ in range(self._plan.params.n)]
        chunk_usage: Usage | None | msgspec.UnsetType
        chunk_usage = None if self._body.include_usage else UNSET
        is_first = True
        async with aclosing(self._outputs(stream=True)) as outputs:
            async for output in outputs:
                if self._body.counts_in_chunks:
                    chunk_usage = count_usage([output])
                for completion in output.outputs:
                    choice = self._chunk(writers[completion.index], completion)
                    if choice is None:
                        continue
                    message = self._chunk_message([choice], chunk_usage)
                    if self._body.return_token_ids and is_first:
                        message.prompt_token_ids = output.prompt_token_ids
                    is_first = False
                    yield encode(message)
        if self._body.include_usage:
            yield encode(self._chunk_message([], count_usage([output])))

    def _outputs(self, stream: bool) -> AsyncGenerator[RequestOutput, None]:
        plan = self._plan
        return self._serving.generate(
            plan.prompt,
            plan.params,
            plan.lora_request,
            self._service,
            stream,
            self._body.beam_length_penalty,
        )

    def _writer(self) -> MessageWriter:
        return MessageWriter(
            self._plan.make_parser(),
            shows_reasoning=self._body.include_reasoning is not False,
            tells_tokens=bool(self._body.return_token_ids),
        )

    def _choice(self, completion: CompletionOutput) -> ChatChoice:
        writer = self._writer()
        delta = writer.push(completion.text, is_final=True)
        message = AssistantMessage(delta.content)
        if delta.reasoning is not None:
            message.reasoning = delta.reasoning
        if delta.tool_calls is not None:
            message.tool_calls = delta.tool_calls
            for call in delta.tool_calls:
                call.index = None
        elif delta.content is None:
            message.content = ""
        choice = ChatChoice(
            index=completion.index,
            message=message,
            logprobs=self._logprobs(completion.token_ids, completion.logprobs or []),
            finish_reason=writer.finish_reason(completion.finish_reason),
            stop_reason=completion.stop_reason,
        )
        if self._body.return_token_ids:
            choice.token_ids = completion.token_ids
        return choice

    def _chunk(self, writer: MessageWriter, completion: CompletionOutput) -> ChatChunkChoice | None:
        delta = writer.tracker.advance(completion)
        if delta is None:
            return None
        is_final = delta.finish_reason is not None
        message = writer.push(delta.text, is_final)
        if message == ChatDelta() and not (is_final or delta.logprobs or writer.tells_tokens):
            return None
        message.content = message.content or (None if message.tool_calls else "")
        message.role = None if writer.has_begun else "assistant"
        writer.has_begun = True
        choice = ChatChunkChoice(
            index=completion.index,
            delta=message,
            logprobs=self._logprobs(delta.token_ids, delta.logprobs),
            finish_reason=writer.finish_reason(delta.finish_reason),
            stop_reason=delta.stop_reason,
        )
        if writer.tells_tokens:
            choice.token_ids = delta.token_ids
        return choice

    def _chunk_message(
        self, choices: list[ChatChunkChoice], usage: Usage | None | msgspec.UnsetType
    ) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=self._heading.id,
            created=self._heading.created,
            model=self._heading.model,
            choices=choices,
            usage=usage,
        )

    def _logprobs(
        self, token_ids: list[int], entries: list[dict[int, Logprob]]
    ) -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        return ChatLogprobs(
            [
                self._logprob(token_id, entry)
                for token_id, entry in zip(token_ids, entries, strict=True)
            ]
        )

    def _logprob(self, token_id: int, entry: dict[int, Logprob]) -> ChatLogprob:
        """The chosen token and the likeliest ones, which may include it."""
        num_top = self._body.top_logprobs or 0
        likeliest = sorted(entry.items(), key=lambda item: item[1].rank)[:num_top]
        text = self._token_text(token_id, entry[token_id])
        return ChatLogprob(
            token=text,
            logprob=entry[token_id].logprob,
            bytes=list(text.encode()),
            top_logprobs=[self._top_logprob(*item) for item in likeliest],
        )

    def _top_logprob(self, token_id: int, logprob: Logprob) -> TopLogprob:
        text = self._token_text(token_id, logprob)
        return TopLogprob(text, logprob.logprob, list(text.encode()))


class MessageWriter:
    """Writes one choice's message, at once or piece by piece."""

    def __init__(self, parser: MessageParser, shows_reasoning: bool, tells_tokens: bool) -> None:
        self.tracker = DeltaTracker(tells_tokens)
        self.tells_tokens = tells_tokens
        self.has_begun = False
        """Whether a chunk of it was sent."""
        self._parser = parser
        self._shows_reasoning = shows_reasoning
        self._num_calls = 0

    def push(self, text: str, is_final: bool) -> ChatDelta:
        """What this text adds to the message."""
        delta = ChatDelta()
        for part in self._parser.push(text, is_final):
            match part:
                case Reasoning():
                    if self._shows_reasoning:
                        delta.reasoning = (delta.reasoning or "") + part.text
                case Content():
                    delta.content = (delta.content or "") + part.text
                case _:
                    self._add_to_call(delta, part)
        return delta

    def finish_reason(self, reason: str | None) -> str | None:
        return "tool_calls" if reason == "stop" and self._num_calls else reason

    def _add_to_call(self, delta: ChatDelta, part: Event) -> None:
        calls = delta.tool_calls = delta.tool_calls or []
        if isinstance(part, CallBegin):
            # Mistral's chat templates take ids of nine letters and digits only.
            call = ToolCall(CalledFunction("", part.name), uuid.uuid4().hex[:9], "function")
            self._num_calls += 1
        elif calls:
            calls[-1].function.arguments += part.text
            return
        else:
            call = ToolCall(CalledFunction(part.text))
        call.index = self._num_calls - 1
        calls.append(call)
