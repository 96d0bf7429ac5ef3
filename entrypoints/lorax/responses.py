"""What LoRAX's routes answer."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType


class AlternativeToken(msgspec.Struct):
    id: int
    text: str
    logprob: float


class Token(msgspec.Struct):
    """A generated token; its text is what it adds to the text before it."""

    id: int
    text: str
    logprob: float
    special: bool
    alternative_tokens: list[AlternativeToken] | UnsetType = UNSET
    skipped: bool = False


class PrefillToken(msgspec.Struct):
    id: int
    text: str
    logprob: float | None


class BestOfSequence(msgspec.Struct):
    generated_text: str
    finish_reason: str
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]


class Details(msgspec.Struct):
    finish_reason: str
    prompt_tokens: int
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    best_of_sequences: list[BestOfSequence] | UnsetType = UNSET
    skipped_tokens: int = 0


class StreamDetails(msgspec.Struct):
    finish_reason: str
    prompt_tokens: int
    generated_tokens: int
    seed: int | None
    skipped_tokens: int = 0


class GenerateResponse(msgspec.Struct):
    generated_text: str
    details: Details | UnsetType = UNSET


class StreamResponse(msgspec.Struct):
    """One event; the last has the whole text and, if wanted, the details."""

    token: Token
    generated_text: str | None = None
    details: StreamDetails | None = None


class SimpleToken(msgspec.Struct):
    """A token of /tokenize, with the characters of the text that it stands for."""

    id: int
    text: str
    start: int
    stop: int


class Info(msgspec.Struct, kw_only=True):
    """Answer of GET /info."""

    model_id: str
    model_sha: str | None
    model_dtype: str
    model_device_type: str
    model_pipeline_tag: str
    max_concurrent_requests: int | None
    max_best_of: int
    max_stop_sequences: int
    max_input_length: int
    max_total_tokens: int
    max_batch_total_tokens: int
    version: str
