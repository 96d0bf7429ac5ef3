"""Reads tensors out of checkpoint files: several at once, and straight to where they go.

Mapping the files instead takes several times as long, for the sake of page faults.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from loraplex.engine.models.weights import Place

Tensor = torch.Tensor
Unit = TypeVar("Unit")
Tensors = deque[tuple[str, Future[Tensor | None], Place]]
"""Name, tensor and place of each; the tensor is None if it is in its place already."""
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16,
    "I32": torch.int32, "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
NUM_READERS = 4
# Of the units behind the one whose turn it is.
READ_AHEAD_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor is in a file, and how its bytes become one."""

    file: Path
    offset: int
    num_bytes: int
    decode: Callable[[Tensor], Tensor]
    """uint8 [num_bytes] -> the tensor."""
    plain: tuple[torch.dtype, torch.Size] | None = None
    """Dtype and shape, if the bytes are the tensor's as they are."""

    def read(self) -> Tensor:
        return self.decode(self._read_to(torch.empty(self.num_bytes, dtype=torch.uint8)))

    def read_for(self, place: object) -> Tensor | None:
        """The tensor; None if it could be read into its place at once."""
        if not isinstance(place, Tensor):
            return self.read()
        if place.is_cpu and place.is_contiguous() and self.plain == (place.dtype, place.shape):
            self._read_to(place.view(-1).view(torch.uint8))
            return None
        buffer = torch.empty(self.num_bytes, dtype=torch.uint8, pin_memory=place.is_cuda)
        return self.decode(self._read_to(buffer))

    def _read_to(self, buffer: Tensor) -> Tensor:
        view, done = memoryview(buffer.numpy().data), 0
        descriptor = os.open(self.file, os.O_RDONLY)
        try:
            while done < self.num_bytes:
                count = os.preadv(descriptor, [view[done:]], self.offset + done)
                if count == 0:
                    raise ValueError(f"{self.file} ends before its tensors do")
                done += count
        finally:
            os.close(descriptor)
        return buffer


def read_ahead(
    units: Iterable[tuple[Unit, list[tuple[str, StoredTensor, Place]]]],
) -> Iterator[tuple[Unit, Tensors]]:
    """Each unit and its tensors, in turn, while threads read those of the units that follow. The
    given lists are emptied."""
    with ThreadPoolExecutor(NUM_READERS, thread_name_prefix="weights") as pool:
        ahead: deque[tuple[Unit, Tensors, int]] = deque()
        num_bytes = 0
        for unit, wanted in units:
            size = sum(stored.num_bytes for _, stored, _ in wanted)
            tensors = deque((n, pool.submit(s.read_for, p), p) for n, s, p in wanted)
            wanted.clear()
            ahead.append((unit, tensors, size))
            num_bytes += size
            while num_bytes - ahead[0][2] > READ_AHEAD_BYTES:
                num_bytes -= ahead[0][2]
                yield ahead.popleft()[:2]
        while ahead:
            yield ahead.popleft()[:2]


def safetensors_tensors(file: Path) -> Iterator[tuple[str, StoredTensor]]:
    """Every tensor of a file, in the order in which they lie there.

    The format: 8 bytes with the size of the header, the header as JSON, the tensors.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            header_size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(header_size, size)))
        header.pop("__metadata__", None)
        entries = sorted(header.items(), key=lambda entry: entry[1]["data_offsets"])
        for name, entry in entries:
            dtype, shape = DTYPES[entry["dtype"]], torch.Size(entry["shape"])
            start, end = (8 + header_size + offset for offset in entry["data_offsets"])
            if end > size or end - start != shape.numel() * dtype.itemsize:
                raise ValueError(f"tensor {name!r} is not whole")
            view = partial(_view, dtype=dtype, shape=shape)
            yield name, StoredTensor(file, start, end - start, view, (dtype, shape))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} can't be read as safetensors: {error}") from error


def _view(data: Tensor, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    return data.view(dtype).view(shape)
