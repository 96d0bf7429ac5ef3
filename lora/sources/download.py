"""Brings an adapter's files into a directory: resumed where they were cut, never beyond a size."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from loraplex.lora.sources.listing import (
    PICKLED_FILE,
    Listing,
    Patience,
    SourceFile,
    SourceUnavailable,
)
from loraplex.lora.sources.pickled import convert_pickled
from loraplex.lora.spec import AdapterError

PARTIAL_SUFFIX = ".part"


def download_files(
    listing: Listing,
    files: Sequence[SourceFile],
    directory: Path,
    patience: Patience,
    on_bytes: Callable[[int], None],
) -> None:
    """Have all files in the directory, which may hold some of them, or parts, from before.

    Pickled weights become safetensors. on_bytes is told how many bytes each read brought.
    Raises AdapterError.
    """
    try:
        for file in files:
            if not _is_complete(directory / file.name, file):
                _download(listing, file, directory / file.name, patience, on_bytes)
            if file.name == PICKLED_FILE:
                convert_pickled(directory)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise AdapterError("the disk of the adapter cache is full", status=507) from error
        raise


def _is_complete(path: Path, file: SourceFile) -> bool:
    return path.is_file() and path.stat().st_size == file.num_bytes


def _download(
    listing: Listing,
    file: SourceFile,
    path: Path,
    patience: Patience,
    on_bytes: Callable[[int], None],
) -> None:
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    with open(partial, "ab") as target:
        if target.tell() > file.num_bytes:
            target.truncate(0)
        if target.tell() < file.num_bytes:
            with listing.open(file, target.tell(), patience) as (start, pieces):
                target.truncate(start)
                num_bytes = start
                for piece in pieces:
                    num_bytes += len(piece)
                    if num_bytes > file.num_bytes:
                        target.truncate(0)
                        raise AdapterError(
                            f"{file.name} is larger than the {file.num_bytes} bytes that its "
                            "source said"
                        )
                    target.write(piece)
                    on_bytes(len(piece))
                    patience.next_timeout()
            if num_bytes < file.num_bytes:
                raise SourceUnavailable(
                    f"{file.name} was cut at {num_bytes} of {file.num_bytes} bytes"
                )
        # A crash after the entry has got its place in the cache must not leave it empty.
        target.flush()
        os.fsync(target.fileno())
    if file.sha256 is not None and _sha256(partial) != file.sha256:
        partial.unlink()
        raise SourceUnavailable(
            f"{file.name} was damaged on its way: its SHA-256 is not the source's"
        )
    partial.rename(path)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
