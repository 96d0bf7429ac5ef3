"""The block formats of GGUF files.

Formats of 5 and 6 bits are held in 8, which is what they are multiplied as.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from loraplex.engine.models.quantization.codes import INT4, INT8, Code
from loraplex.engine.models.quantization.grouped import GroupedMatrix
from loraplex.engine.models.quantization.settings import check_divisible, unsupported
from loraplex.engine.models.weights import NamedPlaces

Tensor = torch.Tensor
# Values uint8 [blocks, size], scales [blocks, groups], middles like scales or None.
Unpacked = tuple[Tensor, Tensor, Tensor | None]


class Gguf:
    """The types of the tensors, by module."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._types = config["types"]
        for module, name in self._types.items():
            if name not in FORMATS and module != "model.embed_tokens":
                raise unsupported(f"types[{module!r}]", name, "one of " + ", ".join(FORMATS))

    def part(
        self, module: str, out_features: int, in_features: int, like: torch.Tensor
    ) -> GgufPart | None:
        if module not in self._types:
            return None
        form = FORMATS[self._types[module]]
        check_divisible(module, "inputs", in_features, form.size)
        return GgufPart(form, out_features, in_features, like)


class GgufPart:
    """Rows of blocks."""

    def __init__(self, form: Format, out_features: int, in_features: int, like: Tensor) -> None:
        self._format = form
        self._shape = out_features, in_features // form.size * form.num_bytes
        self._like = like

    def places(self) -> NamedPlaces:
        self._blocks = self._like.new_empty(self._shape, dtype=torch.uint8)
        yield "weight", self._blocks

    def read(self) -> GroupedMatrix:
        rows = self._shape[0]
        blocks = self._blocks.view(-1, self._format.num_bytes)
        values, scales, middles = self._format.unpack(blocks)
        return GroupedMatrix(
            self._format.code,
            values=values.reshape(rows, -1),
            scales=scales.reshape(rows, -1),
            middles=None if middles is None else middles.reshape(rows, -1),
            dtype=self._like.dtype,
        )


@dataclass(frozen=True, slots=True)
class Format:
    """A block of so many values in so many bytes, and how to unpack uint8 [blocks, num_bytes]."""

    size: int
    num_bytes: int
    code: Code
    unpack: Callable[[Tensor], Unpacked]


def _half(blocks: Tensor, start: int) -> Tensor:
    """The float16 at this byte of each block: float32 [blocks, 1]."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _shifted(data: Tensor, shifts: list[int], width: int) -> Tensor:
    """uint8 [blocks, n] -> [blocks, n / width * shifts, width]: each run of bytes, shifted right
    by each of the shifts in turn."""
    runs = data.unflatten(1, (-1, 1, width))
    return (runs >> torch.tensor(shifts, device=data.device).byte()[:, None]).flatten(1, 2)


def _unpack_q8_0(blocks: Tensor) -> Unpacked:
    return blocks[:, 2:] ^ 128, _half(blocks, 0), None


def _unpack_q4_0(blocks: Tensor) -> Unpacked:
    return _shifted(blocks[:, 2:], [0, 4], 16) & 15, _half(blocks, 0), None


def _unpack_q4_1(blocks: Tensor) -> Unpacked:
    scales = _half(blocks, 0)
    return _shifted(blocks[:, 4:], [0, 4], 16) & 15, scales, _half(blocks, 2) + 8 * scales


def _scales_and_minimums(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of Q4_K and Q5_K, for the 8 groups of a block: 6 bits each, of which the upper 2 of the
    last four lie above the first four's."""
    first, second, rest = blocks[:, 4:16].unflatten(1, (3, 4)).unbind(1)
    scales = torch.cat([first & 63, rest & 15 | first >> 2 & 48], dim=1)
    minimums = torch.cat([second & 63, rest >> 4 | second >> 2 & 48], dim=1)
    return _half(blocks, 0) * scales, _half(blocks, 2) * minimums


def _unpack_q4_k(blocks: Tensor) -> Unpacked:
    scales, minimums = _scales_and_minimums(blocks)
    return _shifted(blocks[:, 16:], [0, 4], 32) & 15, scales, 8 * scales - minimums


def _unpack_q5_k(blocks: Tensor) -> Unpacked:
    scales, minimums = _scales_and_minimums(blocks)
    high = _shifted(blocks[:, 16:48], list(range(8)), 32) & 1
    values = _shifted(blocks[:, 48:], [0, 4], 32) & 15 | high << 4
    return values + (128 - 16), scales, 16 * scales - minimums


def _unpack_q6_k(blocks: Tensor) -> Unpacked:
    low = _shifted(blocks[:, :128], [0, 4], 64) & 15
    high = _shifted(blocks[:, 128:192], [0, 2, 4, 6], 32) & 3
    values = low.view(high.shape) | high << 4
    scales = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8)
    return values + (128 - 32), scales, None


FORMATS = {
    "Q4_0": Format(32, 18, INT4, _unpack_q4_0),
    "Q4_1": Format(32, 20, INT4, _unpack_q4_1),
    "Q8_0": Format(32, 34, INT8, _unpack_q8_0),
    "Q4_K": Format(256, 144, INT4, _unpack_q4_k),
    "Q5_K": Format(256, 176, INT8, _unpack_q5_k),
    "Q6_K": Format(256, 210, INT8, _unpack_q6_k),
}
