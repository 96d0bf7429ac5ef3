"""POST /v1/completions: OpenAI's completions over the engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

import msgspec
from fastapi import APIRouter, Request, Response
from msgspec import UNSET

from loraplex.engine.lora_request import LoRARequest
from loraplex.engine.outputs import CompletionOutput, Logprob, RequestOutput
from loraplex.entrypoints.http.serving import Serving
from loraplex.entrypoints.http.streaming import (
    EventStream,
    json_response,
    merge,
    unless_disconnected,
)
from loraplex.entrypoints.openai.common import (
    DeltaTracker,
    TokenText,
    count_usage,
    make_heading,
    token_text_of,
)
from loraplex.entrypoints.openai.requests import CompletionRequest
from loraplex.entrypoints.openai.responses import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Usage,
)

router = APIRouter()


@router.post("/v1/completions")
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Continue a text, or several."""
    serving: Serving = request.app.state.serving
    lora_request = body.find_adapter(serving.models)
    prompts = await encode_prompts(serving, body, lora_request)
    answer = CompletionAnswer(serving, body, lora_request, prompts)
    if body.stream:
        return EventStream(answer.events())
    return json_response(await unless_disconnected(request.receive, answer.whole()))


async def encode_prompts(
    serving: Serving, body: CompletionRequest, lora_request: LoRARequest | None
) -> list[list[int]]:
    """The token ids of each prompt. Raises ApiError, ValueError."""
    has_special_tokens = body.add_special_tokens is not False
    prompts: list[list[int]] = []
    for prompt in body.prompt:
        if isinstance(prompt, str):
            tokenizer = await serving.tokenizer_of(lora_request)
            prompt = await serving.encode(prompt, has_special_tokens, tokenizer)
        max_model_len = serving.engine.model_info.max_model_len
        prompts.append(body.truncate(prompt, max_model_len, body.max_tokens))
    return prompts


class CompletionAnswer:
    """The answer to one body, whole or as events.

    Raises ApiError or ValueError for what can be refused at once.
    """

    def __init__(
        self,
        serving: Serving,
        body: CompletionRequest,
        lora_request: LoRARequest | None,
        prompts: list[list[int]],
    ) -> None:
        self._serving = serving
        self._body = body
        self._lora_request = lora_request
        self._params = body.sampling_params(serving.engine.model_info.default_sampling)
        self._service = body.service()
        self._prompts = prompts
        serving.limits.check_batch(len(prompts), self._params)
        for prompt in prompts:
            serving.check_max_tokens(len(prompt), body.max_tokens)
        self._heading = make_heading("cmpl", body)
        self._num_choices = body.n or 1
        self._writers = [
            ChoiceWriter(body, token_text_of(serving, body), number, self._prompt_text(prompt))
            for number, prompt in enumerate(
                p for p in body.prompt for _ in range(self._num_choices)
            )
        ]

    async def whole(self) -> Completion:
        finals: dict[int, RequestOutput] = {}
        async with aclosing(self._outputs(stream=False)) as outputs:
            async for index, output in outputs:
                finals[index] = output
        in_order = [finals[index] for index in range(len(finals))]
        usage = count_usage(in_order, self._body.scores_prompt_only)
        if self._body.chooses:
            in_order = [keep_best(output, self._num_choices) for output in in_order]
        choices = [c for i, output in enumerate(in_order) for c in self._write(i, output)]
        return self._message(choices, usage)

    async def events(self) -> AsyncGenerator[bytes, None]:
        encode = msgspec.json.Encoder().encode
        latest: dict[int, RequestOutput] = {}
        chunk_usage: Usage | None | msgspec.UnsetType
        chunk_usage = None if self._body.include_usage else UNSET
        async with aclosing(self._outputs(stream=True)) as outputs:
            async for index, output in outputs:
                latest[index] = output
                if self._body.counts_in_chunks:
                    chunk_usage = count_usage(latest.values(), self._body.scores_prompt_only)
                for choice in self._write(index, output):
                    yield encode(self._message([choice], chunk_usage))
        if self._body.include_usage:
            usage = count_usage(latest.values(), self._body.scores_prompt_only)
            yield encode(self._message([], usage))

    def _prompt_text(self, prompt: str | list[int]) -> str:
        """What echo repeats."""
        if not self._body.echo or isinstance(prompt, str):
            return str(prompt)
        return self._serving.tokenizer.decode(prompt)

    def _outputs(self, stream: bool) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        return merge(
            [
                self._serving.generate(
                    prompt,
                    self._params,
                    self._lora_request,
                    self._service,
                    stream,
                    self._body.beam_length_penalty,
                )
                for prompt in self._prompts
            ]
        )

    def _write(self, index: int, output: RequestOutput) -> list[CompletionChoice]:
        """What is new in the choices of one prompt."""
        writers = self._writers[index * self._num_choices :]
        choices = (writers[c.index].advance(output, c) for c in output.outputs)
        return [choice for choice in choices if choice is not None]

    def _message(
        self, choices: list[CompletionChoice], usage: Usage | None | msgspec.UnsetType
    ) -> Completion:
        return Completion(
            id=self._heading.id,
            created=self._heading.created,
            model=self._heading.model,
            choices=choices,
            usage=usage,
        )


def keep_best(output: RequestOutput, num: int) -> RequestOutput:
    """With so many of its completions: those whose tokens were likeliest on average."""

    def likelihood(completion: CompletionOutput) -> float:
        return (completion.cumulative_logprob or 0.0) / max(1, len(completion.token_ids))

    best = sorted(output.outputs, key=likelihood, reverse=True)[:num]
    outputs = [replace(completion, index=index) for index, completion in enumerate(best)]
    return replace(output, outputs=outputs)


class ChoiceWriter:
    """Writes one choice, at once or piece by piece."""

    def __init__(
        self, body: CompletionRequest, token_text: TokenText, number: int, prompt_text: str
    ) -> None:
        self._body = body
        self._token_text = token_text
        self._number = number
        self._prompt_text = prompt_text
        self._tracker = DeltaTracker(bool(body.return_token_ids))
        self._text_offset = 0

    def advance(
        self, output: RequestOutput, completion: CompletionOutput
    ) -> CompletionChoice | None:
        """What is new since the last time, or None."""
        is_first = not self._tracker.has_begun
        delta = self._tracker.advance(completion)
        if delta is None:
            return None
        text, token_ids = delta.text, delta.token_ids
        entries: list[dict[int, Logprob] | None] = [*delta.logprobs]
        if self._body.scores_prompt_only:
            text, token_ids, entries = "", [], []
        if self._body.echo and is_first:
            text = self._prompt_text + text
            token_ids = [*output.prompt_token_ids, *token_ids]
            entries = [*(output.prompt_logprobs or []), *entries]
        choice = CompletionChoice(
            index=self._number,
            text=text,
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
        )
        if self._body.logprobs is not None:
            choice.logprobs = self._logprobs(token_ids, entries)
        if self._body.return_token_ids:
            choice.token_ids = delta.token_ids
            if is_first:
                choice.prompt_token_ids = output.prompt_token_ids
        if self._body.prompt_logprobs is not None:
            choice.prompt_logprobs = output.prompt_logprobs
        return choice

    def _logprobs(
        self, token_ids: list[int], entries: list[dict[int, Logprob] | None]
    ) -> CompletionLogprobs:
        """Of these tokens; an entry is None where nothing precedes the token."""
        logprobs = CompletionLogprobs([], [], [], [])
        for token_id, entry in zip(token_ids, entries, strict=True):
            chosen = None if entry is None else entry[token_id]
            text = self._token_text(token_id, chosen)
            logprobs.tokens.append(text)
            logprobs.token_logprobs.append(None if chosen is None else chosen.logprob)
            logprobs.top_logprobs.append(self._top_logprobs(entry))
            logprobs.text_offset.append(self._text_offset)
            self._text_offset += len(text)
        return logprobs

    def _top_logprobs(self, entry: dict[int, Logprob] | None) -> dict[str, float] | None:
        if entry is None:
            return None
        top: dict[str, float] = {}
        for token_id, logprob in entry.items():
            # Tokens that are parts of characters look alike; the likelier one is kept.
            top.setdefault(self._token_text(token_id, logprob), logprob.logprob)
        return top
