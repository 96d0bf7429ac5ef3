"""How one request wants its tokens chosen, and when to stop. Pure data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from loraplex.engine.structured_outputs.params import StructuredOutputsParams

MAX_LOGPROBS = 100
MAX_BAD_WORDS = 1024
MAX_BAD_WORD_LENGTH = 256


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling and stopping parameters of one request, with vLLM's names and defaults.

    Raises ValueError, naming the field, the value and what is allowed.
    """

    n: int = 1
    """Completions to generate for the prompt."""
    temperature: float = 1.0
    """0 is greedy; larger is more random."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 or -1 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probabilities sum to at least this."""
    min_p: float = 0.0
    """Keep tokens at least this times as likely as the most likely one."""
    repetition_penalty: float = 1.0
    """Divide (positive) or multiply (negative) the logits of tokens in prompt or output by this."""
    presence_penalty: float = 0.0
    """Subtract this once from the logit of every token already in the output."""
    frequency_penalty: float = 0.0
    """Subtract this from the logit of a token for every time it is in the output."""
    seed: int | None = None
    """With a seed, the request draws the same random numbers, whatever else is in the batch."""
    stop: str | Sequence[str] = ()
    """Strings that end the output; a single string is taken as one."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the output, beside the model's end-of-sequence ids."""
    include_stop_str_in_output: bool = False
    """Keep the stop string, or the text of the stop token, at the end of the text."""
    min_tokens: int = 0
    """No end of sequence, stop token or stop string before this many tokens."""
    max_tokens: int | None = 16
    """At most this many tokens; None generates up to the model's length."""
    ignore_eos: bool = False
    """Go on after the end-of-sequence token."""
    logprobs: int | None = None
    """Report the log-probabilities of this many most likely tokens, and of the chosen one."""
    prompt_logprobs: int | None = None
    """The same for every prompt token."""
    pooling: str | None = None
    """Generate nothing and give the prompt's embedding: "last" is its last token's hidden state,
    "mean" the mean of all, scaled to length 1."""
    logit_bias: dict[int, float] = field(default_factory=dict)
    """Add to the logits of these token ids, each in [-100, 100]."""
    allowed_token_ids: tuple[int, ...] | None = None
    """Nothing but these tokens; None allows all."""
    bad_words: tuple[str, ...] = ()
    """Words that do not come, whether a text begins with them or they follow a space: the token
    that would complete one is not chosen. In other tokens the same letters may come."""
    structured_outputs: StructuredOutputsParams | None = None
    """What the text must look like: a JSON schema, a regular expression, ..."""
    detokenize: bool = True
    """Produce text; without it only token ids come back."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""

    def __post_init__(self) -> None:
        # The object is frozen; this is its construction.
        object.__setattr__(self, "stop", _as_tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", _as_tuple(self.stop_token_ids))
        object.__setattr__(self, "bad_words", _as_tuple(self.bad_words))
        if self.allowed_token_ids is not None:
            allowed = tuple(dict.fromkeys(_as_tuple(self.allowed_token_ids)))
            object.__setattr__(self, "allowed_token_ids", allowed)
        try:
            logit_bias = {int(k): float(v) for k, v in (self.logit_bias or {}).items()}
        except (AttributeError, TypeError, ValueError):
            _check("logit_bias", self.logit_bias, False, "a dict of token ids to numbers")
        object.__setattr__(self, "logit_bias", logit_bias)
        self._check_types()
        self._check_ranges()
        if self.structured_outputs is not None:
            self._check_structured_outputs()
        if self.pooling is not None:
            _check("pooling", self.pooling, self.pooling in ("last", "mean"), "'last' or 'mean'")
            _check("n", self.n, self.n == 1, "1 with pooling")

    def _check_types(self) -> None:
        for name in ("n", "top_k", "min_tokens"):
            _check(name, getattr(self, name), _is_int(getattr(self, name)), "an integer")
        for name in ("seed", "max_tokens", "logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _check(name, value, value is None or _is_int(value), "an integer or None")
        for name in (
            "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty",
            "frequency_penalty",
        ):  # fmt: skip
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            _check(name, value, is_number and math.isfinite(value), "a finite number")
        for name in ("include_stop_str_in_output", "ignore_eos", "detokenize",
                     "skip_special_tokens"):  # fmt: skip
            value = getattr(self, name)
            _check(name, value, isinstance(value, bool), "True or False")
        _check("stop", self.stop, all(isinstance(s, str) and s for s in self.stop),
               "a non-empty string or several")  # fmt: skip
        _check("bad_words", self.bad_words, all(isinstance(s, str) and s for s in self.bad_words),
               "non-empty strings")  # fmt: skip
        for name in ("stop_token_ids", "allowed_token_ids"):
            value = getattr(self, name) or ()
            _check(name, value, all(_is_int(t) and t >= 0 for t in value), "token ids of 0 or more")

    def _check_ranges(self) -> None:
        _check("n", self.n, 1 <= self.n <= 128, "1 to 128")
        _check("temperature", self.temperature, 0 <= self.temperature <= 100, "0 to 100")
        _check("top_k", self.top_k, -1 <= self.top_k < 2**31,
               "-1 or 0 (all), or 1 and more, of 31 bits")  # fmt: skip
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, up to 1")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "0 to 1")
        _check("repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty <= 100,
               "above 0, up to 100")  # fmt: skip
        for name in ("presence_penalty", "frequency_penalty"):
            _check(name, getattr(self, name), -2 <= getattr(self, name) <= 2, "-2 to 2")
        if self.seed is not None:
            _check("seed", self.seed, -(2**63) <= self.seed < 2**64, "a 64-bit integer")
        _check("min_tokens", self.min_tokens, 0 <= self.min_tokens < 2**31,
               "0 or more, of 31 bits")  # fmt: skip
        if self.max_tokens is not None:
            _check("max_tokens", self.max_tokens, 1 <= self.max_tokens < 2**31,
                   "1 or more, of 31 bits, or None")  # fmt: skip
            _check("min_tokens", self.min_tokens, self.min_tokens <= self.max_tokens,
                   f"at most max_tokens={self.max_tokens}")  # fmt: skip
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _check(name, value, 0 <= value <= MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}, or None")
        allowed = self.allowed_token_ids
        _check("allowed_token_ids", allowed, allowed is None or len(allowed) > 0,
               "one token id at least, or None for all")  # fmt: skip
        _check("bad_words", f"{len(self.bad_words)} words", len(self.bad_words) <= MAX_BAD_WORDS,
               f"at most {MAX_BAD_WORDS} words")  # fmt: skip
        for word in self.bad_words:
            _check("bad_words", word, len(word) <= MAX_BAD_WORD_LENGTH,
                   f"words of at most {MAX_BAD_WORD_LENGTH} characters")  # fmt: skip
        for token_id, bias in self.logit_bias.items():
            _check(f"logit_bias[{token_id}]", bias, token_id >= 0 and -100 <= bias <= 100,
                   "a token id of 0 or more with a bias of -100 to 100")  # fmt: skip

    def _check_structured_outputs(self) -> None:
        """The grammar alone says what may come, and where the output may end."""
        value = self.structured_outputs
        _check("structured_outputs", value, isinstance(value, StructuredOutputsParams),
               "StructuredOutputsParams")  # fmt: skip
        allowed = "its default with structured_outputs"
        _check("ignore_eos", self.ignore_eos, not self.ignore_eos, allowed)
        _check("min_tokens", self.min_tokens, self.min_tokens == 0, allowed)
        _check("allowed_token_ids", self.allowed_token_ids, self.allowed_token_ids is None, allowed)
        _check("bad_words", self.bad_words, not self.bad_words, allowed)

    @property
    def is_greedy(self) -> bool:
        return self.temperature < 1e-5

    @property
    def has_penalties(self) -> bool:
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


def _as_tuple(value: Any) -> tuple[Any, ...]:
    """One or several, or none, as a tuple."""
    if value is None:
        return ()
    is_one = isinstance(value, str) or not isinstance(value, Iterable)
    return (value,) if is_one else tuple(value)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check(name: str, value: Any, is_allowed: bool, allowed: str) -> None:
    if not is_allowed:
        raise ValueError(f"{name}={value!r} is not allowed: it must be {allowed}")
