"""Adapters' own chat templates and tokens, where their directories have them.

A template costs a text. A tokenizer costs tens of megabytes, so the base model's serves every
adapter whose file is the same, as training scripts leave it.
"""

from __future__ import annotations

import filecmp
import json
from collections import OrderedDict
from pathlib import Path

from loraplex.engine.lora_request import LoRARequest
from loraplex.engine.text.tokenizer import Tokenizer, load_tokenizer

TEMPLATE, CONFIG, TOKENIZER = "chat_template.jinja", "tokenizer_config.json", "tokenizer.json"
MAX_NUM_REMEMBERED = 256

Key = tuple[str, tuple[int | None, ...]]


class AdapterTokenizers:
    """Finds the tokenizer for a request."""

    def __init__(self, base: Tokenizer, base_path: str) -> None:
        self._base = base
        self._base_path = Path(base_path)
        # In order of use, the last used at the end. None stands for the base model's.
        self._found: OrderedDict[Key, Tokenizer | None] = OrderedDict()

    def is_at_hand(self, lora_request: LoRARequest | None) -> bool:
        """Whether `find` need read no file."""
        key = _key(lora_request)
        return key is None or key in self._found

    def find(self, lora_request: LoRARequest | None) -> Tokenizer:
        """The adapter's tokenizer, as its files are now, or the base model's.

        Raises ValueError for files that can't be read.
        """
        key = _key(lora_request)
        if key is None:
            return self._base
        if key not in self._found:
            self._found[key] = self._load(Path(key[0]))
            if len(self._found) > MAX_NUM_REMEMBERED:
                self._found.popitem(last=False)
        self._found.move_to_end(key)
        return self._found[key] or self._base

    def _load(self, directory: Path) -> Tokenizer | None:
        base_file, own_file = self._base_path / TOKENIZER, directory / TOKENIZER
        if own_file.is_file() and base_file.is_file() and not filecmp.cmp(own_file, base_file):
            return load_tokenizer(directory)
        template = _read_template(directory)
        if template is None or template == self._base.chat_template:
            return None
        return self._base.with_chat_template(template)


def _key(lora_request: LoRARequest | None) -> Key | None:
    """The directory, and when its files changed; None if it has none of its own."""
    if lora_request is None or not lora_request.lora_path.startswith("/"):
        return None
    directory = Path(lora_request.lora_path)
    times = tuple(_modified(directory / name) for name in (TEMPLATE, CONFIG, TOKENIZER))
    return None if times == (None, None, None) else (str(directory), times)


def _modified(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _read_template(directory: Path) -> str | None:
    try:
        if (directory / TEMPLATE).is_file():
            return (directory / TEMPLATE).read_text()
        if (directory / CONFIG).is_file():
            template = json.loads((directory / CONFIG).read_text()).get("chat_template")
            return template if isinstance(template, str) else None
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"the chat template in {str(directory)!r} can't be read: {error}"
        ) from error
    return None
