"""POST /v1/chat/completions: OpenAI's chats over the engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec
from fastapi import APIRouter, Request, Response
from msgspec import UNSET

from loraplex.engine.outputs import CompletionOutput, Logprob, RequestOutput
from loraplex.entrypoints.openai_common import DeltaTracker, count_usage, make_heading
from loraplex.entrypoints.openai_requests import ChatCompletionRequest
from loraplex.entrypoints.openai_responses import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprob,
    ChatLogprobs,
    TopLogprob,
    Usage,
)
from loraplex.entrypoints.serving import Serving
from loraplex.entrypoints.streaming import EventStream, json_response, unless_disconnected

router = APIRouter()


@router.post("/v1/chat/completions")
async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
    """Answer a conversation."""
    serving: Serving = request.app.state.serving
    prompt = await serving.encode_chat(
        [message.for_template() for message in body.messages],
        body.add_generation_prompt,
        body.chat_template_kwargs or {},
    )
    answer = ChatAnswer(serving, body, prompt)
    if body.stream:
        return EventStream(answer.events())
    return json_response(await unless_disconnected(request.receive, answer.whole()))


class ChatAnswer:
    """The answer to one body, whole or as events.

    Raises ApiError or ValueError for what can be refused at once.
    """

    def __init__(self, serving: Serving, body: ChatCompletionRequest, prompt: list[int]) -> None:
        self._serving = serving
        self._body = body
        self._lora_request = serving.models.resolve(body.model)
        self._params = body.sampling_params(serving.engine.model_info.default_sampling)
        self._service = body.service()
        serving.check_max_tokens(len(prompt), self._params.max_tokens)
        self._prompt = prompt
        self._heading = make_heading("chatcmpl", body.model)

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
        return answer

    async def events(self) -> AsyncGenerator[bytes, None]:
        encode = msgspec.json.Encoder().encode
        trackers = [DeltaTracker() for _ in range(self._params.n)]
        chunk_usage = None if self._body.include_usage else UNSET
        async with aclosing(self._outputs(stream=True)) as outputs:
            async for output in outputs:
                for completion in output.outputs:
                    choice = self._chunk(trackers[completion.index], completion)
                    if choice is not None:
                        yield encode(self._chunk_message([choice], chunk_usage))
        if self._body.include_usage:
            yield encode(self._chunk_message([], count_usage([output])))

    def _outputs(self, stream: bool) -> AsyncGenerator[RequestOutput, None]:
        return self._serving.generate(
            self._prompt, self._params, self._lora_request, self._service, stream
        )

    def _choice(self, completion: CompletionOutput) -> ChatChoice:
        return ChatChoice(
            index=completion.index,
            message=AssistantMessage(completion.text),
            logprobs=self._logprobs(completion.token_ids, completion.logprobs or []),
            finish_reason=completion.finish_reason,
            stop_reason=completion.stop_reason,
        )

    def _chunk(self, tracker: DeltaTracker, completion: CompletionOutput) -> ChatChunkChoice | None:
        role = None if tracker.has_begun else "assistant"
        delta = tracker.advance(completion)
        if delta is None:
            return None
        return ChatChunkChoice(
            index=completion.index,
            delta=ChatDelta(delta.text, role),
            logprobs=self._logprobs(delta.token_ids, delta.logprobs),
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
        )

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
        text = self._serving.token_text(token_id, entry[token_id])
        return ChatLogprob(
            token=text,
            logprob=entry[token_id].logprob,
            bytes=list(text.encode()),
            top_logprobs=[self._top_logprob(*item) for item in likeliest],
        )

    def _top_logprob(self, token_id: int, logprob: Logprob) -> TopLogprob:
        text = self._serving.token_text(token_id, logprob)
        return TopLogprob(text, logprob.logprob, list(text.encode()))
