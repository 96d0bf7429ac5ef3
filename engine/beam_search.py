"""Beam search: the likeliest sequences, found by continuing so many at a time. No torch.

A step continues every beam by one token, each as a request of its own: what beams have in common is
in the prefix cache, so that they cost about a token each. Knows no engine; who has one asks
`prompts` of it and gives back what comes to `extend`.

The search is that of transformers' `generate(num_beams=..., early_stopping="never")`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loraplex.engine.errors import describe
from loraplex.engine.lora_request import LoRARequest
from loraplex.engine.messages import EngineRequest
from loraplex.engine.outputs import CompletionOutput, RequestOutput
from loraplex.engine.sampling_params import SamplingParams
from loraplex.engine.text.tokenizer import Tokenizer
from loraplex.lora.recipe import is_finite_number

MAX_BEAM_WIDTH = 64


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """How to search, with vLLM's names.

    Raises ValueError, naming the field, the value and what is allowed.
    """

    beam_width: int
    """Sequences to continue at a time, and to give in the end."""
    max_tokens: int
    """At most this many tokens, where the model's length leaves them."""
    ignore_eos: bool = False
    """Go on after the end-of-sequence token."""
    temperature: float = 0.0
    """0: nothing is drawn at random."""
    length_penalty: float = 1.0
    """A sequence's log-probability is divided by its generated tokens to this power: larger values
    favour longer ones."""
    include_stop_str_in_output: bool = False
    """Keep the end-of-sequence token."""

    def __post_init__(self) -> None:
        checks = [
            ("beam_width", _is_in(self.beam_width, MAX_BEAM_WIDTH), f"1 to {MAX_BEAM_WIDTH}"),
            ("max_tokens", _is_in(self.max_tokens, 2**31 - 1), "1 or more, of 31 bits"),
            ("temperature", self.temperature == 0, "0: beam search draws nothing at random"),
            ("length_penalty", is_finite_number(self.length_penalty), "a finite number"),
        ]
        for name, is_allowed, allowed in checks:
            if not is_allowed:
                value = describe(getattr(self, name))
                raise ValueError(f"{name}={value} is not allowed: it must be {allowed}")


@dataclass(slots=True)
class BeamSearchSequence:
    """One that was found."""

    tokens: list[int]
    """With the prompt's."""
    cum_logprob: float
    """Of the generated tokens."""
    lora_request: LoRARequest | None
    finish_reason: str
    """"stop" (end of sequence) or "length"."""
    stop_reason: int | None = None
    """The end-of-sequence token's id."""
    text: str | None = None
    """Of all tokens; None without a tokenizer."""


@dataclass(slots=True)
class BeamSearchOutput:
    """What was found for a prompt, the best first."""

    sequences: list[BeamSearchSequence]


@dataclass(frozen=True, slots=True)
class _Beam:
    token_ids: tuple[int, ...] = ()
    """Generated ones."""
    logprob: float = 0.0
    is_finished: bool = False


class BeamSearch:
    """The search for one prompt."""

    def __init__(self, request: EngineRequest, params: BeamSearchParams) -> None:
        """The request has the prompt, and as max_tokens what the model's length leaves of them."""
        self.request = request
        self._params = params
        self._eos_token_ids = () if params.ignore_eos else tuple(request.eos_token_ids)
        self._beams = [_Beam()]
        self._finished: list[_Beam] = []
        self.step_params = SamplingParams(
            temperature=0,
            max_tokens=1,
            ignore_eos=True,
            detokenize=False,
            # So many may be continued, and those that end a sequence are not.
            logprobs=params.beam_width + len(self._eos_token_ids),
        )
        """Of the requests for `prompts`."""

    @property
    def is_done(self) -> bool:
        """Whether no step could change what is found."""
        if self._has_all_tokens or not self._beams:
            return True
        if len(self._finished) < self._params.beam_width:
            return False
        # A longer sequence is never likelier; its length may yet speak for it.
        best = self._beams[0]
        length = len(best.token_ids) + 1
        if self._params.length_penalty > 0:
            length = self.request.max_tokens
        return self._normalize(best.logprob, length) <= self._score(self._finished[-1])

    def prompts(self) -> list[dict[str, Any]]:
        """What to generate one more token for each of."""
        prompt = self.request.prompt_token_ids
        return [{"prompt_token_ids": [*prompt, *beam.token_ids]} for beam in self._beams]

    def extend(self, outputs: Sequence[RequestOutput]) -> None:
        """Go on with what came for each of `prompts`."""
        width = self._params.beam_width
        candidates: list[_Beam] = []
        for beam, output in zip(self._beams, outputs, strict=True):
            (likeliest,) = output.outputs[0].logprobs or []
            candidates += [
                _Beam(
                    (*beam.token_ids, token_id),
                    beam.logprob + entry.logprob,
                    is_finished=token_id in self._eos_token_ids,
                )
                for token_id, entry in likeliest.items()
            ]
        candidates.sort(key=lambda beam: -beam.logprob)
        # One that ends counts only if it would have been continued.
        finished = self._finished + [beam for beam in candidates[:width] if beam.is_finished]
        self._finished = sorted(finished, key=self._score, reverse=True)[:width]
        self._beams = [beam for beam in candidates if not beam.is_finished][:width]

    def output(self, tokenizer: Tokenizer | None) -> BeamSearchOutput:
        """What was found."""
        found = self._finished + (self._beams if self._has_all_tokens else [])
        best = sorted(found, key=self._score, reverse=True)[: self._params.beam_width]
        return BeamSearchOutput([self._sequence(beam, tokenizer) for beam in best])

    def request_output(self, tokenizer: Tokenizer | None, first: RequestOutput) -> RequestOutput:
        """What was found as completions of the prompt. first: what came of the first step."""
        found, num_prompt = self.output(tokenizer).sequences, len(self.request.prompt_token_ids)
        completions = [
            CompletionOutput(
                index=index,
                text="" if tokenizer is None else tokenizer.decode(sequence.tokens[num_prompt:]),
                token_ids=sequence.tokens[num_prompt:],
                cumulative_logprob=sequence.cum_logprob,
                finish_reason=sequence.finish_reason,
            )
            for index, sequence in enumerate(found)
        ]
        metrics = replace(first.metrics, finished_time=time.monotonic())
        return replace(first, outputs=completions, metrics=metrics)

    @property
    def _has_all_tokens(self) -> bool:
        return bool(self._beams) and len(self._beams[0].token_ids) == self.request.max_tokens

    def _normalize(self, logprob: float, length: int) -> float:
        return logprob / length**self._params.length_penalty

    def _score(self, beam: _Beam) -> float:
        return self._normalize(beam.logprob, len(beam.token_ids))

    def _sequence(self, beam: _Beam, tokenizer: Tokenizer | None) -> BeamSearchSequence:
        sequence = BeamSearchSequence(
            tokens=[*self.request.prompt_token_ids, *beam.token_ids],
            cum_logprob=beam.logprob,
            lora_request=self.request.lora_request,
            finish_reason="length",
        )
        if beam.is_finished:
            sequence.finish_reason, sequence.stop_reason = "stop", beam.token_ids[-1]
            if not self._params.include_stop_str_in_output:
                sequence.tokens.pop()
        if tokenizer is not None:
            sequence.text = tokenizer.decode(sequence.tokens)
        return sequence


def run_searches(
    searches: Sequence[BeamSearch], generate: Callable[..., list[RequestOutput]]
) -> None:
    """All to their ends, with LLM.generate: the beams of all of them together in each step."""
    while running := [search for search in searches if not search.is_done]:
        prompts = [(search, prompt) for search in running for prompt in search.prompts()]
        outputs = iter(
            generate(
                [prompt for _, prompt in prompts],
                [search.step_params for search, _ in prompts],
                [search.request.lora_request for search, _ in prompts],
            )
        )
        for search in running:
            search.extend([next(outputs) for _ in search.prompts()])


def _is_in(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most
