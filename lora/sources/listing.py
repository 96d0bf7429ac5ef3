"""What a source says of an adapter, and which of its files are taken."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from loraplex.lora.peft_config import CONFIG_FILE, WEIGHTS_FILE
from loraplex.lora.sources.reference import AdapterReference
from loraplex.lora.spec import AdapterError

PICKLED_FILE = "adapter_model.bin"
# What an adapter may bring besides: its tokenizer and its chat template.
EXTRA_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
WANTED_FILES = (CONFIG_FILE, WEIGHTS_FILE, PICKLED_FILE, *EXTRA_FILES)

Identity = tuple[str, ...]
"""What files are: source, where they were found, version. Equal identities, equal files."""


class SourceUnavailable(AdapterError):
    """A source did not answer as it should; it may do so when asked again."""

    def __init__(self, message: str, status: int = 502) -> None:
        super().__init__(message, status)


@dataclass(frozen=True)
class SourceFile:
    """A file of an adapter: its path below the adapter's folder, and its size in bytes."""

    name: str
    num_bytes: int
    etag: str = ""
    """s3: what a later read of the file must still have."""
    sha256: str | None = None


@dataclass(frozen=True)
class Patience:
    """How long a fetch may still take."""

    deadline: float
    """time.monotonic()"""
    stall_seconds: float
    """The longest wait for a connection or for its next bytes."""
    is_closing: Callable[[], bool]

    def next_timeout(self) -> float:
        """Seconds that the next answer may take. Raises AdapterError when none are left."""
        self.check_open()
        seconds = self.deadline - time.monotonic()
        if seconds <= 0:
            raise AdapterError("it took too long; what has come is kept for next time", status=504)
        return min(seconds, self.stall_seconds)

    def check_open(self) -> None:
        """Raises AdapterError if the fetcher is being closed."""
        if self.is_closing():
            raise AdapterError("the engine is shutting down", status=503)


OpenFile = Callable[
    [SourceFile, int, Patience], AbstractContextManager[tuple[int, Iterator[bytes]]]
]
"""(file, offset, patience) -> (the offset that it really begins at, the bytes from there on)"""


@dataclass(frozen=True)
class Listing:
    """What an adapter is at this moment, for one who may read it."""

    identity: Identity
    files: Sequence[SourceFile] | None
    """None: the source can't be asked, and only a cached copy may serve."""
    open: OpenFile
    directory: Path | None = None
    """file: where the files are already."""
    alias: Identity | None = None
    """hub: under what to remember the identity, for when the hub can't be asked."""

    @property
    def version(self) -> str:
        return self.identity[-1]


class Source(Protocol):
    """A place that has adapters."""

    def find(self, reference: AdapterReference, token: str | None, patience: Patience) -> Listing:
        """Find an adapter's files and version, and that whoever has the token may read them.

        Raises AdapterError, SourceUnavailable if another attempt may help.
        """


def choose_files(files: Sequence[SourceFile], allow_pickled: bool) -> list[SourceFile]:
    """The files to take. Raises AdapterError if they are not an adapter that can be read."""
    by_name = {file.name: file for file in files}
    if CONFIG_FILE not in by_name:
        nested = [
            n.removesuffix("/" + CONFIG_FILE) for n in by_name if n.endswith("/" + CONFIG_FILE)
        ]
        hint = f"; subfolders that have one: {', '.join(sorted(nested)[:10])}" if nested else ""
        raise AdapterError(f"there is no {CONFIG_FILE}: this is not a PEFT adapter{hint}")
    if WEIGHTS_FILE in by_name:
        weights = WEIGHTS_FILE
    elif PICKLED_FILE not in by_name:
        raise AdapterError(f"there is no {WEIGHTS_FILE}")
    elif not allow_pickled:
        raise AdapterError(
            f"there is no {WEIGHTS_FILE}, and {PICKLED_FILE} is pickled, which this server does "
            "not read: convert it to safetensors, or start the engine with "
            "allow_pickled_adapters"
        )
    else:
        weights = PICKLED_FILE
    names = (CONFIG_FILE, weights, *EXTRA_FILES)
    return [by_name[name] for name in names if name in by_name]
