"""From what users give to what the core takes: checks, tokenises, fills in what is left open.

Every mistake that can be seen without the model's weights and adapters is found here.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from loraplex.engine.errors import describe
from loraplex.engine.lora_request import LoRARequest
from loraplex.engine.messages import EngineRequest, ModelInfo, Service
from loraplex.engine.sampling_params import SamplingParams
from loraplex.engine.text.tokenizer import Tokenizer

Prompt = str | list[int] | dict[str, Any]
PROMPT_KEYS = {"prompt", "prompt_token_ids"}
MAX_NUM_TOKENS = 1 << 31  # as token ids are counted in a step


class InputProcessor:
    """Makes EngineRequests for one model."""

    def __init__(self, model_info: ModelInfo, tokenizer: Tokenizer | None, seed: int) -> None:
        """Without a tokenizer only token ids are taken. Requests without a seed of their own draw
        theirs from `seed`, in the order of the calls."""
        self._model_info = model_info
        self._tokenizer = tokenizer
        self._seeds = random.Random(seed)

    def process(
        self,
        request_id: str,
        prompt: Prompt,
        sampling_params: SamplingParams,
        lora_request: LoRARequest | None = None,
        service: Service | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> list[EngineRequest]:
        """One request per completion: request_id itself, or request_id#0, #1, ... if there are
        several, whose seeds count up. tokenizer: the adapter's own, if it has one.
        Raises ValueError naming field, value and what is allowed.
        """
        tokenizer = tokenizer or self._tokenizer
        self._check_params(sampling_params)
        prompt_token_ids = self._prompt_token_ids(prompt, tokenizer)
        # An adapter may have tokens of its own, which the core knows.
        num_tokens = None if lora_request is None else MAX_NUM_TOKENS
        self._check_token_ids("prompt", prompt_token_ids, num_tokens)
        own = [] if tokenizer is None else tokenizer.eos_token_ids
        eos_token_ids = sorted({*self._model_info.eos_token_ids, *own})
        max_tokens = self._max_tokens(len(prompt_token_ids), sampling_params)
        if sampling_params.pooling is not None:
            max_tokens = 1  # It comes with the prompt, and is nobody's.
        bad_words = [] if tokenizer is None else _bad_words(sampling_params.bad_words, tokenizer)
        seed = self._seeds.getrandbits(64) if sampling_params.seed is None else sampling_params.seed
        num = sampling_params.n
        return [
            EngineRequest(
                request_id=request_id if num == 1 else f"{request_id}#{index}",
                prompt_token_ids=prompt_token_ids,
                sampling_params=sampling_params,
                max_tokens=max_tokens,
                eos_token_ids=eos_token_ids,
                bad_words_token_ids=bad_words,
                seed=(seed + index) % 2**64,
                lora_request=lora_request,
                service=service or Service(),
            )
            for index in range(num)
        ]

    def _check_params(self, params: SamplingParams) -> None:
        if params.stop and (self._tokenizer is None or not params.detokenize):
            raise ValueError(
                f"stop={describe(params.stop)} is not allowed without text: it needs a tokenizer "
                "and detokenize=True"
            )
        for name in ("structured_outputs", "bad_words"):
            if getattr(params, name) and self._tokenizer is None:
                raise ValueError(f"{name} is not allowed without a tokenizer: it is of text")
        self._check_token_ids("stop_token_ids", params.stop_token_ids)
        self._check_token_ids("logit_bias", params.logit_bias)
        self._check_token_ids("allowed_token_ids", params.allowed_token_ids or ())

    def _prompt_token_ids(self, prompt: Prompt, tokenizer: Tokenizer | None) -> list[int]:
        content = _content(prompt)
        if not isinstance(content, str):
            token_ids = content
        elif tokenizer is not None:
            token_ids = tokenizer.encode(content)
        else:
            raise ValueError(
                f"prompt={describe(content)} is not allowed: without a tokenizer it must be "
                "token ids"
            )
        if not token_ids:
            raise ValueError(
                f"prompt={describe(prompt)} is not allowed: it must have one token at least"
            )
        return token_ids

    def _max_tokens(self, num_prompt_tokens: int, params: SamplingParams) -> int:
        """max_tokens, or less where the model's length leaves less."""
        max_model_len = self._model_info.max_model_len
        if num_prompt_tokens >= max_model_len:
            raise ValueError(
                f"prompt of {num_prompt_tokens} tokens is not allowed: it must have at most "
                f"{max_model_len - 1}, one less than max_model_len={max_model_len}"
            )
        left = max_model_len - num_prompt_tokens
        if params.min_tokens > left:
            raise ValueError(
                f"min_tokens={params.min_tokens} is not allowed: max_model_len={max_model_len} "
                f"leaves at most {left} for a prompt of {num_prompt_tokens} tokens"
            )
        return left if params.max_tokens is None else min(params.max_tokens, left)

    def _check_token_ids(
        self, field: str, token_ids: Iterable[int], vocab_size: int | None = None
    ) -> None:
        """vocab_size: the base model's by default."""
        vocab_size = vocab_size or self._model_info.vocab_size
        for token_id in (min(token_ids, default=0), max(token_ids, default=0)):
            if not 0 <= token_id < vocab_size:
                raise ValueError(
                    f"token id {token_id} in {field} is not allowed: it must be 0 to "
                    f"{vocab_size - 1}, the vocabulary"
                )


def _bad_words(words: Iterable[str], tokenizer: Tokenizer) -> list[list[int]]:
    """The tokens of each word as a text begins with it, and as it follows a space, if that is not
    the same behind a token for the space."""
    sequences = []
    for word in words:
        word = word.lstrip() or word
        bare, spaced = (
            tokenizer.encode(text, add_special_tokens=False) for text in (word, f" {word}")
        )
        sequences += [bare] if spaced[-len(bare) :] == bare else [bare, spaced]
    return [sequence for sequence in sequences if sequence]


def prompt_text(prompt: Prompt) -> str | None:
    """The text of a prompt, if it came with one."""
    text = prompt.get("prompt") if isinstance(prompt, dict) else prompt
    return text if isinstance(text, str) else None


def _content(prompt: Any) -> str | list[int]:
    """The prompt's token ids or, if it has none, its text."""
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, dict):
        return _integers("prompt", prompt, "a string, a list of token ids, or a dict with either")
    if not prompt or not prompt.keys() <= PROMPT_KEYS:
        raise ValueError(
            f"prompt={describe(prompt)} is not allowed: a dict must have prompt_token_ids, or "
            "prompt with the text, or both, and nothing else"
        )
    if "prompt_token_ids" in prompt:
        return _integers("prompt_token_ids", prompt["prompt_token_ids"], "a list of integers")
    if not isinstance(prompt["prompt"], str):
        raise ValueError(f"prompt={describe(prompt['prompt'])} is not allowed: it must be a string")
    return prompt["prompt"]


def _integers(name: str, token_ids: Any, allowed: str) -> list[int]:
    if not isinstance(token_ids, str | bytes):
        with suppress(TypeError):
            return list(map(operator.index, token_ids))
    raise ValueError(f"{name}={describe(token_ids)} is not allowed: it must be {allowed}")
