"""What completions and chats share on the way out: ids, deltas and token counts."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from loraplex.engine.outputs import CompletionOutput, Logprob, RequestOutput
from loraplex.entrypoints.http.serving import Serving
from loraplex.entrypoints.openai.requests import GenerationRequest
from loraplex.entrypoints.openai.responses import PromptTokensDetails, Usage

TokenText = Callable[[int, Logprob | None], str]


@dataclass(frozen=True)
class Heading:
    """What all chunks of an answer have in common."""

    id: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))


def make_heading(prefix: str, body: GenerationRequest) -> Heading:
    return Heading(f"{prefix}-{body.request_id or uuid.uuid4().hex}", body.model)


def token_text_of(serving: Serving, body: GenerationRequest) -> TokenText:
    """How this answer's log-probabilities name tokens."""
    if body.return_tokens_as_token_ids:
        return lambda token_id, logprob: f"token_id:{token_id}"
    return serving.token_text


def count_usage(outputs: Iterable[RequestOutput], scores_prompt_only: bool = False) -> Usage:
    """The token counts of an answer to one or several prompts."""
    prompt_tokens = completion_tokens = cached_tokens = 0
    for output in outputs:
        prompt_tokens += len(output.prompt_token_ids)
        cached_tokens += output.num_cached_tokens
        if not scores_prompt_only:
            completion_tokens += sum(len(c.token_ids) for c in output.outputs)
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens),
    )


@dataclass(slots=True)
class Delta:
    """What is new of a completion."""

    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]]
    finish_reason: str | None
    stop_reason: int | str | None


class DeltaTracker:
    """Cuts the growing outputs of one completion into deltas."""

    def __init__(self, tells_tokens: bool = False) -> None:
        """tells_tokens: those without text are something to tell, too."""
        self._tells_tokens = tells_tokens
        self.has_begun = False
        """Whether there was a delta."""
        self._num_characters = 0
        self._num_tokens = 0
        self._is_finished = False

    def advance(self, completion: CompletionOutput) -> Delta | None:
        """What this output adds to the one before; None if that is nothing to tell.

        Tokens whose text is held back come with the text, or with their log-probabilities.
        """
        text = completion.text[self._num_characters :]
        logprobs = (completion.logprobs or [])[self._num_tokens :]
        is_finished = completion.finish_reason is not None
        token_ids = completion.token_ids[self._num_tokens :]
        is_news = text or logprobs or is_finished or (token_ids and self._tells_tokens)
        if self._is_finished or not is_news:
            return None
        delta = Delta(
            text=text,
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=completion.finish_reason,
            stop_reason=completion.stop_reason,
        )
        self._num_characters += len(text)
        self._num_tokens = len(completion.token_ids)
        self._is_finished = is_finished
        self.has_begun = True
        return delta
