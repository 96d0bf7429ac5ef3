"""Adapters in local directories, below the roots that the operator configured."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from loraplex.lora.peft_config import WEIGHTS_FILE, adapter_fingerprint
from loraplex.lora.sources.listing import (
    PICKLED_FILE,
    WANTED_FILES,
    Listing,
    Patience,
    SourceFile,
)
from loraplex.lora.sources.reference import AdapterReference
from loraplex.lora.spec import AdapterError

PIECE_BYTES = 1 << 20


class LocalSource:
    """Directories of this machine. The version is the files' fingerprint (times and sizes)."""

    def __init__(self, roots: Sequence[str]) -> None:
        """roots: directories below which adapters may be; none allow any path."""
        self._roots = [Path(root).expanduser().resolve() for root in roots]

    def find(self, reference: AdapterReference, token: str | None, patience: Patience) -> Listing:
        """Symlinks are followed first, the directory's and the files', and then judged."""
        directory = Path(os.path.realpath(reference.location))
        # Before anything else, so that nobody learns what there is outside.
        self._check_root(directory)
        if not os.path.isdir(directory):
            raise AdapterError("there is no such directory", status=404)
        files = []
        for name in WANTED_FILES:
            path = Path(os.path.realpath(directory / name))
            self._check_root(path)
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            except OSError as error:
                raise AdapterError(f"{name} cannot be read: {error.strerror}") from None
            if stat.S_ISREG(status.st_mode):
                files.append(SourceFile(name, status.st_size))
        version = _version(directory, {file.name for file in files})

        @contextmanager
        def open_file(
            file: SourceFile, offset: int, patience: Patience
        ) -> Iterator[tuple[int, Iterator[bytes]]]:
            with open(directory / file.name, "rb") as source:
                yield 0, iter(lambda: source.read(PIECE_BYTES), b"")

        identity = ("file", "", str(directory), "", version)
        return Listing(identity, files, open_file, directory=directory)

    def _check_root(self, path: Path) -> None:
        if self._roots and not any(path.is_relative_to(root) for root in self._roots):
            raise AdapterError(
                "it is not below a directory that this server may read adapters from", status=403
            )


def _version(directory: Path, names: set[str]) -> str:
    version = adapter_fingerprint(str(directory))
    if WEIGHTS_FILE not in names and PICKLED_FILE in names:
        status = (directory / PICKLED_FILE).stat()
        version += f"/{status.st_mtime_ns}:{status.st_size}"
    return version
