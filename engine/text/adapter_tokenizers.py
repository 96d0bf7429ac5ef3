"""Adapters' own chat templates and tokens, where their directories have them.

Where a directory is, the user says, or, of an adapter from elsewhere, the core, which fetched it.

A template costs a text. A tokenizer costs tens of megabytes, so the base model's serves every
adapter whose file is the same, as training scripts leave it.
"""

from __future__ import annotations

import filecmp
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraplex.engine.lora_request import LoRARequest
from loraplex.engine.text.tokenizer import Tokenizer, load_tokenizer
from loraplex.lora.sources.reference import AdapterReference, parse_adapter_reference
from loraplex.lora.spec import AdapterError

TEMPLATE, CONFIG, TOKENIZER = "chat_template.jinja", "tokenizer_config.json", "tokenizer.json"
MAX_NUM_REMEMBERED = 256
MAX_NUM_PLACES = 65_536
# How long it is remembered where the core has an adapter's files: its version may change.
PLACE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an adapter's files are, and the key of what was read there."""

    directory: Path | None
    """None if it has been read."""
    key: Hashable
    valid_until: float


class AdapterTokenizers:
    """Finds the tokenizer for a request."""

    def __init__(
        self, base: Tokenizer, base_path: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._base = base
        self._base_path = Path(base_path)
        self._clock = clock
        # In order of use, the last used at the end; and of what has nothing of its own.
        self._found: OrderedDict[Hashable, Tokenizer] = OrderedDict()
        self._plain: OrderedDict[Hashable, None] = OrderedDict()
        # Of adapters from elsewhere, by reference and token, as they were learnt.
        self._places: OrderedDict[tuple[AdapterReference, str | None], _Place] = OrderedDict()

    def is_placed(self, lora_request: LoRARequest | None) -> bool:
        """Whether it is known where the adapter's files are; if not, `learn` it, and then `find`
        at once."""
        reference = _reference(lora_request)
        if lora_request is None or reference is None or reference.source == "file":
            return True
        place = self._places.get((reference, lora_request.token))
        if place is None or self._clock() >= place.valid_until:
            return False
        return self._has_read(place) or (place.directory is not None and place.directory.is_dir())

    def known_version(self, lora_request: LoRARequest) -> str:
        """That of which no file need be read again; "" if there is none."""
        place = self._place(lora_request)
        return str(place.key) if place is not None and self._has_read(place) else ""

    def learn(self, lora_request: LoRARequest, version: str, directory: str | None) -> None:
        """The core has this version of an adapter, in this directory if it is not the known one."""
        reference = _reference(lora_request)
        assert reference is not None
        key = reference, lora_request.token
        path = None if directory is None else Path(directory)
        place = _Place(path, version, self._clock() + PLACE_SECONDS)
        _remember(self._places, key, place, MAX_NUM_PLACES)

    def forget(self, lora_request: LoRARequest) -> None:
        """The adapter may have another version now, whatever token reads it."""
        reference = _reference(lora_request)
        for key in [key for key in self._places if key[0] == reference]:
            del self._places[key]

    def is_at_hand(self, lora_request: LoRARequest | None) -> bool:
        """Whether `find` need read no file."""
        place = self._place(lora_request)
        return place is None or self._has_read(place)

    def find(self, lora_request: LoRARequest | None) -> Tokenizer:
        """The adapter's tokenizer, as its files are now, or the base model's.

        Raises ValueError for files that can't be read.
        """
        place = self._place(lora_request)
        if place is None:
            return self._base
        if not self._has_read(place):
            assert place.directory is not None
            tokenizer = self._load(place.directory)
            if tokenizer is None:
                _remember(self._plain, place.key, None, MAX_NUM_PLACES)
            else:
                _remember(self._found, place.key, tokenizer, MAX_NUM_REMEMBERED)
        if place.key in self._plain:
            return self._base
        self._found.move_to_end(place.key)
        return self._found[place.key]

    def _has_read(self, place: _Place) -> bool:
        return place.key in self._plain or place.key in self._found

    def _place(self, lora_request: LoRARequest | None) -> _Place | None:
        """None if there is nothing of its own, as far as is known."""
        reference = _reference(lora_request)
        if lora_request is None or reference is None:
            return None
        if reference.source != "file":
            return self._places.get((reference, lora_request.token))
        directory = Path(reference.location)
        times = tuple(_modified(directory / name) for name in (TEMPLATE, CONFIG, TOKENIZER))
        if times == (None, None, None):
            return None
        return _Place(directory, (directory, times), 0.0)

    def _load(self, directory: Path) -> Tokenizer | None:
        base_file, own_file = self._base_path / TOKENIZER, directory / TOKENIZER
        if own_file.is_file() and base_file.is_file() and not filecmp.cmp(own_file, base_file):
            return load_tokenizer(directory)
        template = _read_template(directory)
        if template is None or template == self._base.chat_template:
            return None
        return self._base.with_chat_template(template)


def _remember(memory: OrderedDict[Any, Any], key: Hashable, value: Any, most: int) -> None:
    """At the end; what is at the beginning is forgotten if there are too many."""
    memory[key] = value
    memory.move_to_end(key)
    if len(memory) > most:
        memory.popitem(last=False)


def _reference(lora_request: LoRARequest | None) -> AdapterReference | None:
    """Of one adapter; several that are merged have no tokenizer of their own."""
    if lora_request is None or lora_request.merged_adapters is not None:
        return None
    try:
        return parse_adapter_reference(lora_request.lora_path)
    except AdapterError:
        return None  # The core will say so.


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
