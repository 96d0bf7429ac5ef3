"""From the engine's outputs to LoRAX's: tokens with the text that each adds, details, headers."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing

import msgspec
from msgspec import UNSET

from loraplex.engine.lora_request import LoRARequest
from loraplex.engine.messages import Service
from loraplex.engine.outputs import CompletionOutput, Logprob, RequestOutput
from loraplex.engine.text.detokenizer import IncrementalDecoder
from loraplex.engine.text.tokenizer import Tokenizer
from loraplex.entrypoints.http.errors import IncompleteGeneration
from loraplex.entrypoints.http.serving import Serving
from loraplex.entrypoints.lorax.requests import GenerateParameters, GenerateRequest
from loraplex.entrypoints.lorax.responses import (
    AlternativeToken,
    BestOfSequence,
    Details,
    GenerateResponse,
    PrefillToken,
    StreamDetails,
    StreamResponse,
    Token,
)
from loraplex.lora.sources.reference import ADAPTER_SOURCES, parse_adapter_reference


class GenerateAnswer:
    """The answer to one body, whole or as events.

    Raises ApiError or ValueError for what can be refused at once.
    """

    def __init__(
        self,
        serving: Serving,
        body: GenerateRequest,
        prompt_token_ids: list[int],
        lora_request: LoRARequest | None,
        tokenizer: Tokenizer,
        received_time: float,
        stream: bool,
    ) -> None:
        """received_time: of time.monotonic(), when the request came."""
        self._serving = serving
        self._body = body
        self._parameters = parameters = body.parameters
        self._prompt_token_ids = prompt_token_ids
        self._lora_request = lora_request
        self._tokenizer = tokenizer
        self._received_time = received_time
        self._stream = stream
        self._params = parameters.sampling_params(stream)
        serving.check_max_tokens(len(prompt_token_ids), self._params.max_tokens, "max_new_tokens")

    async def whole(self) -> tuple[GenerateResponse, dict[str, str]]:
        """The answer and its headers. Raises IncompleteGeneration if it was cut short."""
        async with aclosing(self._outputs()) as outputs:
            async for output in outputs:
                final = output
        completions = sorted(final.outputs, key=_mean_logprob, reverse=True)
        best = completions[0]
        answer = GenerateResponse(self._full_text(best.text))
        if self._parameters.wants_tokens:
            sequences = [self._sequence(final, completion) for completion in completions]
            first = sequences[0]
            answer.details = Details(
                finish_reason=first.finish_reason,
                prompt_tokens=len(final.prompt_token_ids),
                generated_tokens=first.generated_tokens,
                seed=first.seed,
                prefill=first.prefill,
                tokens=first.tokens,
                best_of_sequences=sequences[1:] or UNSET,
            )
        return answer, {**self.headers(), **self._counts(final, best)}

    async def events(self) -> AsyncGenerator[bytes, None]:
        encode = msgspec.json.Encoder().encode
        writer = TokenWriter(self._tokenizer, self._parameters)
        async with aclosing(self._outputs()) as outputs:
            async for output in outputs:
                completion = output.outputs[0]
                tokens = list(writer.advance(completion))
                is_finished = completion.finish_reason is not None
                for token in tokens[:-1] if is_finished else tokens:
                    yield encode(StreamResponse(token))
                if is_finished:
                    yield encode(self._last_event(output, tokens[-1], writer.text))

    def headers(self) -> dict[str, str]:
        """What is known before the first token."""
        headers = {
            "x-compute-type": f"{self._serving.engine.model_info.device}+optimized",
            "x-compute-characters": str(len(self._body.inputs)),
            "x-model-id": self._serving.models.base_name,
        }
        if self._lora_request is not None:
            merged = self._parameters.merged_adapters
            ids = [self._parameters.adapter_id or ""] if merged is None else merged.ids
            headers["x-adapter-id"] = _header_text(",".join(ids))
            headers["x-adapter-source"] = _source(self._lora_request)
        return headers

    def _outputs(self) -> AsyncGenerator[RequestOutput, None]:
        return self._serving.generate(
            self._prompt_token_ids, self._params, self._lora_request, Service(), self._stream
        )

    def _last_event(self, output: RequestOutput, token: Token, text: str) -> StreamResponse:
        details = None
        if self._parameters.details:
            completion = output.outputs[0]
            details = StreamDetails(
                finish_reason=_finish_reason(completion),
                prompt_tokens=len(output.prompt_token_ids),
                generated_tokens=len(completion.token_ids),
                seed=self._params.seed,
            )
        return StreamResponse(token, self._full_text(text), details)

    def _full_text(self, text: str) -> str:
        return self._body.inputs + text if self._parameters.return_full_text else text

    def _sequence(self, output: RequestOutput, completion: CompletionOutput) -> BestOfSequence:
        writer = TokenWriter(self._tokenizer, self._parameters)
        return BestOfSequence(
            generated_text=self._full_text(completion.text),
            finish_reason=_finish_reason(completion),
            generated_tokens=len(completion.token_ids),
            seed=self._params.seed,
            prefill=self._prefill(output),
            tokens=list(writer.advance(completion)),
        )

    def _prefill(self, output: RequestOutput) -> list[PrefillToken]:
        """The prompt's tokens, if wanted; nothing precedes the first."""
        entries = zip(output.prompt_token_ids, output.prompt_logprobs or [], strict=False)
        return [
            PrefillToken(
                token_id,
                self._serving.token_text(token_id, entry[token_id] if entry else None),
                entry[token_id].logprob if entry else None,
            )
            for token_id, entry in entries
        ]

    def _counts(self, output: RequestOutput, best: CompletionOutput) -> dict[str, str]:
        """The counts and times in headers; times in whole milliseconds."""
        times, num_tokens = output.metrics, len(best.token_ids)
        inference = times.finished_time - times.first_scheduled_time
        decoding = times.finished_time - times.first_token_time
        total = time.monotonic() - self._received_time
        seconds = {
            "x-compute-time": total,
            "x-total-time": total,
            "x-validation-time": times.arrival_time - self._received_time,
            "x-queue-time": times.first_scheduled_time - times.arrival_time,
            "x-inference-time": inference,
            "x-time-per-token": inference / num_tokens,
            "x-time-to-first-token": times.first_token_time - times.arrival_time,
            "x-time-per-output-token": decoding / max(1, num_tokens - 1),
        }
        counts = {
            "x-prompt-tokens": len(output.prompt_token_ids),
            "x-generated-tokens": num_tokens,
            "x-skipped-tokens": 0,
            "x-total-tokens": len(output.prompt_token_ids) + num_tokens,
        }
        milliseconds = {name: round(1000 * value) for name, value in seconds.items()}
        return {name: str(value) for name, value in (counts | milliseconds).items()}


class TokenWriter:
    """The tokens of one completion as they come, each with the text that it adds."""

    def __init__(self, tokenizer: Tokenizer, parameters: GenerateParameters) -> None:
        self.text = ""
        """Of all tokens so far, without the special ones'."""
        self._tokenizer = tokenizer
        self._num_alternatives = parameters.return_k_alternatives
        self._decoder = IncrementalDecoder(tokenizer, skip_special_tokens=True)
        self._num_tokens = 0

    def advance(self, completion: CompletionOutput) -> Iterator[Token]:
        """What is new since the last time."""
        num_old, self._num_tokens = self._num_tokens, len(completion.token_ids)
        logprobs = completion.logprobs or []
        for position in range(num_old, self._num_tokens):
            token_id, entry = completion.token_ids[position], logprobs[position]
            text = self._decoder.push(token_id)
            if completion.finish_reason is not None and position == self._num_tokens - 1:
                text += self._decoder.finish()
            self.text += text
            special = "" if text else self._special_text(token_id)
            token = Token(token_id, text or special, entry[token_id].logprob, bool(special))
            if self._num_alternatives is not None:
                token.alternative_tokens = _alternatives(entry, self._num_alternatives)
            yield token

    def _special_text(self, token_id: int) -> str:
        """The text of a special token; "" if it is none."""
        decode = self._tokenizer.decode
        return "" if decode([token_id], True) else decode([token_id], False)


def _alternatives(entry: dict[int, Logprob], num: int) -> list[AlternativeToken]:
    """The likeliest tokens; the chosen one is among them if it is that likely."""
    likeliest = sorted(entry.items(), key=lambda item: item[1].rank)
    return [
        AlternativeToken(token_id, logprob.decoded_token or "", logprob.logprob)
        for token_id, logprob in likeliest[:num]
    ]


def _mean_logprob(completion: CompletionOutput) -> float:
    return (completion.cumulative_logprob or 0.0) / max(1, len(completion.token_ids))


def _finish_reason(completion: CompletionOutput) -> str:
    """As LoRAX calls it. Raises IncompleteGeneration."""
    match completion.finish_reason:
        case "length":
            return "length"
        case "stop":
            return "eos_token" if completion.stop_reason is None else "stop_sequence"
    raise IncompleteGeneration("the generation was ended early")


def _source(lora_request: LoRARequest) -> str:
    """LoRAX's name of where an adapter comes from, of several where the first does."""
    source = parse_adapter_reference(lora_request.parts[0].lora_path).source
    return next(name for name, own in ADAPTER_SOURCES.items() if own == source)


def _header_text(text: str) -> str:
    """What a header can hold of it."""
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in text)
