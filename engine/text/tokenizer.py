"""Text to token ids and back. The one place that knows transformers' tokenizers."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import jinja2

from loraplex.engine.errors import describe
from loraplex.engine.text.generation_config import read_eos_token_ids

PROCESSOR_TEMPLATE = "chat_template.json"
"""Models that also see images may have their chat template here, where tokenizers don't look."""
# What templates fail with, by their own will or because messages are not as they expect. Templates
# run in jinja's sandbox, where they reach nothing but what they are given.
TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class Tokenizer(Protocol):
    """What the engine's front needs of a tokenizer."""

    vocab_size: int
    eos_token_ids: list[int]
    chat_template: str
    """Its source, "" if there is none; of several, one after the other."""

    def with_chat_template(self, chat_template: str) -> Tokenizer:
        """The same tokenizer with another template."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The text's token ids, with those that the model expects around it. ValueError for a text
        that is no Unicode."""

    def encode_with_offsets(
        self, text: str, add_special_tokens: bool = True
    ) -> list[tuple[int, int, int]]:
        """(token id, start, end): each with the characters of the text that it stands for.
        ValueError if the tokenizer does not know them."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD."""

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> list[int]:
        """The token ids of a conversation. ValueError if the model has no chat template, or the
        template refuses the messages."""


class TransformersTokenizer:
    """A tokenizer of transformers as a Tokenizer."""

    def __init__(self, tokenizer: Any, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._template_options: dict[str, str] = {}
        # transformers' own decode spends more time on options than on a few tokens, and joins
        # what the tokens keep apart ("clean up"), so that text would change after it was sent.
        # Tokenizers written in Python have no backend.
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self.vocab_size = len(tokenizer)
        template = tokenizer.chat_template or ""
        self.chat_template = template if isinstance(template, str) else "".join(template.values())
        own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.eos_token_ids = sorted({*eos_token_ids, *own})

    def with_chat_template(self, chat_template: str) -> TransformersTokenizer:
        other = copy.copy(self)
        other.chat_template = chat_template
        other._template_options = {"chat_template": chat_template}
        return other

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        _check_text(text)
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False)

    def encode_with_offsets(
        self, text: str, add_special_tokens: bool = True
    ) -> list[tuple[int, int, int]]:
        if self._backend is None:
            raise ValueError("this model's tokenizer does not know where its tokens are in a text")
        _check_text(text)
        encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
        return [(i, *span) for i, span in zip(encoding.ids, encoding.offsets, strict=True)]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        if self._backend is not None:
            return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return self._tokenizer.decode(
            token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> list[int]:
        kwargs = {**self._template_options, **kwargs}
        if not self._tokenizer.chat_template and "chat_template" not in kwargs:
            raise ValueError(
                f"the tokenizer in {self._tokenizer.name_or_path!r} has no chat template: give "
                "prompts as text or token ids, or a chat_template"
            )
        try:
            return self._tokenizer.apply_chat_template(
                messages,
                add_generation_prompt=add_generation_prompt,
                tokenize=True,
                return_dict=False,
                **kwargs,
            )
        except TEMPLATE_ERRORS as error:
            raise ValueError(f"the chat template refuses the messages: {error}") from error


def _check_text(text: str) -> None:
    """Half of a surrogate pair is a character to Python and to JSON, and none to tokenizers."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text {describe(text)} is not allowed: its character at {error.start}, "
            f"{text[error.start]!r}, is none of Unicode's"
        ) from None


def load_tokenizer(path: str | Path) -> TransformersTokenizer:
    """The tokenizer in a local directory. ValueError if there is none that can be read."""
    # Here, because importing transformers takes seconds, and not everyone needs a tokenizer.
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"no tokenizer can be read from {str(path)!r}: {error}") from error
    template = Path(path) / PROCESSOR_TEMPLATE
    if not tokenizer.chat_template and template.is_file():
        tokenizer.chat_template = json.loads(template.read_text()).get("chat_template")
    return TransformersTokenizer(tokenizer, read_eos_token_ids(path))
