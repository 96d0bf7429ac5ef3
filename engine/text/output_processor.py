"""From the core's tokens to what users get: text, log-probabilities, metrics, one object a request.

Finds stop strings, which the core knows nothing of.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np

from loraplex.engine.errors import RequestError
from loraplex.engine.messages import EngineOutput, EngineRequest, FinishReason, TokenLogprobs
from loraplex.engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from loraplex.engine.sampling_params import SamplingParams
from loraplex.engine.text.detokenizer import Detokenizer
from loraplex.engine.text.tokenizer import Tokenizer


@dataclass(slots=True)
class ProcessedOutputs:
    request_outputs: list[RequestOutput]
    """Of requests that stream and got something, and of those that finished."""
    aborts: list[str]
    """Engine requests that a stop string ended: the core should abort them."""


@dataclass(slots=True, eq=False)
class _Request:
    """A user's request while it runs."""

    output: RequestOutput
    params: SamplingParams
    tokenizer: Tokenizer | None
    token_texts: dict[int, str] | None
    """The tokenizer's, by token id."""
    stream: bool
    unfinished: set[str]
    """Ids of its engine requests that are not finished."""


@dataclass(slots=True, eq=False)
class _Completion:
    """One of its engine requests."""

    request: _Request
    output: CompletionOutput
    detokenizer: Detokenizer | None
    """None if text is made once, at the end, or not at all."""


class OutputProcessor:
    """Keeps the outputs of the running requests."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        """Without a tokenizer there is no text, as with detokenize=False."""
        self._tokenizer = tokenizer
        self._requests: dict[str, _Request] = {}
        self._completions: dict[str, _Completion] = {}
        # Of each tokenizer, the texts of tokens that were wanted.
        self._token_texts: WeakKeyDictionary[Tokenizer, dict[int, str]] = WeakKeyDictionary()

    def add_request(
        self,
        prompt: str | None,
        requests: list[EngineRequest],
        stream: bool,
        tokenizer: Tokenizer | None = None,
    ) -> str:
        """Expect outputs of the engine requests that InputProcessor.process made of one request.

        Returns the user's request id. With stream, every step that gives the request something
        gives a RequestOutput; otherwise only its end does. tokenizer: the adapter's own, if it has
        one.
        """
        first, params = requests[0], requests[0].sampling_params
        output = RequestOutput(
            request_id=first.request_id if params.n == 1 else first.request_id.rpartition("#")[0],
            prompt=prompt,
            prompt_token_ids=first.prompt_token_ids,
            outputs=[],
            finished=False,
            lora_request=first.lora_request,
            prompt_logprobs=None if params.prompt_logprobs is None else [None],
            metrics=RequestMetrics(arrival_time=first.arrival_time),
        )
        tokenizer = tokenizer or self._tokenizer
        texts = None if tokenizer is None else self._token_texts.setdefault(tokenizer, {})
        unfinished = {r.request_id for r in requests}
        request = _Request(output, params, tokenizer, texts, stream, unfinished)
        self._requests[output.request_id] = request
        for index, engine_request in enumerate(requests):
            completion = CompletionOutput(index=index, text="", token_ids=[])
            if params.logprobs is not None:
                completion.logprobs, completion.cumulative_logprob = [], 0.0
            output.outputs.append(completion)
            detokenizer = None
            if tokenizer is not None and params.detokenize and (stream or params.stop):
                detokenizer = Detokenizer(tokenizer, params)
            self._completions[engine_request.request_id] = _Completion(
                request, completion, detokenizer
            )
        return output.request_id

    def process_outputs(self, outputs: list[EngineOutput]) -> ProcessedOutputs:
        """Take in what a step gave. Outputs of requests that are not known, or not any more, are
        ignored."""
        changed: dict[str, _Request] = {}
        aborts: list[str] = []
        now = time.monotonic()
        for output in outputs:
            completion = self._completions.get(output.request_id)
            if completion is None:
                continue
            self._update(completion, output, now)
            request = completion.request
            if completion.output.finish_reason is not None:
                del self._completions[output.request_id]
                request.unfinished.remove(output.request_id)
                if output.finish_reason is None:
                    aborts.append(output.request_id)
            if request.stream or not request.unfinished:
                changed[request.output.request_id] = request
        return ProcessedOutputs([self._emit(request, now) for request in changed.values()], aborts)

    def abort_request(self, request_id: str) -> list[str]:
        """Forget a request, if it is known. Returns the engine requests to abort in the core."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return []
        for engine_request_id in request.unfinished:
            del self._completions[engine_request_id]
        return sorted(request.unfinished)

    def _update(self, completion: _Completion, output: EngineOutput, now: float) -> None:
        result, total = completion.output, completion.request.output
        if total.metrics.first_scheduled_time == 0.0:
            total.metrics.first_scheduled_time = output.first_scheduled_time
            wait = output.adapter_wait
            if wait is not None:
                total.metrics.download_seconds = wait.download
                total.metrics.host_load_seconds = wait.host_load
                total.metrics.copy_seconds = wait.copy
        if output.new_token_ids and total.metrics.first_token_time == 0.0:
            total.metrics.first_token_time = now
        if result.index == 0:
            total.num_cached_tokens = max(total.num_cached_tokens, output.num_cached_tokens)
        if output.prompt_logprobs is not None and result.index == 0:
            entries = (self._logprobs(completion.request, e) for e in output.prompt_logprobs)
            total.prompt_logprobs = [None, *entries]
        if output.embedding is not None:
            total.embedding = _unit_length(output.embedding)
        if output.error is not None and total.error is None:
            total.error = RequestError(output.error, output.error_status, output.retry_after)

        num_old = len(result.token_ids)
        result.token_ids += output.new_token_ids
        stop = self._update_text(completion, num_old, output.finish_reason)
        if stop is not None:
            result.finish_reason, result.stop_reason = FinishReason.STOP.value, stop
        elif output.finish_reason is not None:
            result.finish_reason, result.stop_reason = (
                output.finish_reason.value,
                output.stop_reason,
            )
        if result.logprobs is not None and output.logprobs is not None:
            # A stop string may have cut the tokens.
            for entry in output.logprobs[: len(result.token_ids) - num_old]:
                result.logprobs.append(self._logprobs(completion.request, entry))
                result.cumulative_logprob = (result.cumulative_logprob or 0.0) + entry.logprobs[0]

    def _update_text(
        self, completion: _Completion, num_old: int, finish_reason: FinishReason | None
    ) -> str | None:
        """Make text of the tokens from num_old on. Returns the stop string they complete, behind
        whose last token there is none then."""
        result, params = completion.output, completion.request.params
        num_tokens = len(result.token_ids)
        if finish_reason == FinishReason.STOP and not params.include_stop_str_in_output:
            num_tokens -= 1  # the token that ended it is no text
        detokenizer = completion.detokenizer
        if detokenizer is None:
            tokenizer = completion.request.tokenizer if params.detokenize else None
            if finish_reason is not None and tokenizer is not None:
                result.text = tokenizer.decode(
                    result.token_ids[:num_tokens], params.skip_special_tokens
                )
            return None
        stop = None
        for position in range(num_old, num_tokens):
            stop = detokenizer.push(result.token_ids[position])
            if stop is not None:
                del result.token_ids[position + 1 :]
                break
        if stop is None and finish_reason is not None:
            stop = detokenizer.finish()
        is_finished = stop is not None or finish_reason is not None
        result.text = detokenizer.text if is_finished else detokenizer.visible_text()
        return stop

    def _emit(self, request: _Request, now: float) -> RequestOutput:
        """The request's output as it is now; the consumer may keep it."""
        output = request.output
        if not request.unfinished:
            del self._requests[output.request_id]
            output.finished = True
            output.metrics.finished_time = now
            return output
        # Not dataclasses.replace, which takes three times as long: this is once a token.
        times = output.metrics
        return RequestOutput(
            output.request_id,
            output.prompt,
            output.prompt_token_ids,
            list(map(_copy, output.outputs)),
            False,
            output.lora_request,
            output.prompt_logprobs,
            output.num_cached_tokens,
            RequestMetrics(
                times.arrival_time,
                times.first_scheduled_time,
                times.first_token_time,
                times.finished_time,
                times.download_seconds,
                times.host_load_seconds,
                times.copy_seconds,
            ),
            output.error,
        )

    def _logprobs(self, request: _Request, entry: TokenLogprobs) -> dict[int, Logprob]:
        return {
            token_id: Logprob(logprob, rank, self._token_text(request, token_id))
            for token_id, logprob, rank in zip(
                entry.token_ids, entry.logprobs, entry.ranks, strict=True
            )
        }

    def _token_text(self, request: _Request, token_id: int) -> str | None:
        tokenizer, texts = request.tokenizer, request.token_texts
        if tokenizer is None or texts is None:
            return None
        text = texts.get(token_id)
        if text is None:
            text = texts[token_id] = tokenizer.decode([token_id], skip_special_tokens=False)
        return text


def _unit_length(embedding: bytes) -> list[float]:
    vector = np.frombuffer(embedding, np.float32)
    return (vector / max(float(np.linalg.norm(vector)), 1e-12)).tolist()


def _copy(completion: CompletionOutput) -> CompletionOutput:
    return CompletionOutput(
        completion.index,
        completion.text,
        completion.token_ids.copy(),
        completion.cumulative_logprob,
        None if completion.logprobs is None else completion.logprobs.copy(),
        completion.finish_reason,
        completion.stop_reason,
    )
