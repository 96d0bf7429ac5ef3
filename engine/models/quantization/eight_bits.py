"""Parts that are stored as a byte per weight, [out_features, in_features], and scales."""

from __future__ import annotations

import torch

from loraplex.engine.models.quantization.codes import FLOAT8, INT8, Code
from loraplex.engine.models.quantization.grouped import GroupedMatrix
from loraplex.engine.models.weights import NamedPlaces


class EightBitPart:
    """w = weight * scale; a scale may be of all weights, of a row or of a block of weights."""

    def __init__(
        self,
        code: Code,
        sizes: tuple[int, int],
        scale: tuple[str, tuple[int, ...]],
        like: torch.Tensor,
        block: tuple[int, int] | None = None,
        unused: tuple[str, ...] = (),
    ) -> None:
        """code: INT8 or FLOAT8; sizes: (out_features, in_features); scale: its tensor's name and
        shape; block: (rows, columns) that share one, if neither rows nor the whole do; unused:
        names of further tensors, of one element each."""
        self._code = code
        self._sizes = sizes
        self._scale = scale
        self.block = block
        self._unused = unused
        self._like = like

    def places(self) -> NamedPlaces:
        dtype = torch.int8 if self._code is INT8 else torch.float8_e4m3fn
        self._values = self._like.new_empty(self._sizes, dtype=dtype)
        name, shape = self._scale
        self._scales = self._like.new_empty(shape, dtype=torch.float32)
        yield "weight", self._values
        yield name, self._scales
        for name in self._unused:
            yield name, self._like.new_empty((), dtype=torch.float32)

    def read(self) -> GroupedMatrix:
        out_features, in_features = self._sizes
        scales = self._scales
        if self.block is None:
            scales = scales.reshape(-1, 1).expand(out_features, 1)
        else:
            scales = scales.repeat_interleave(self.block[0], dim=0)[:out_features]
        values = self._values.view(torch.uint8)
        return GroupedMatrix(
            self._code,
            values=values ^ 128 if self._code is INT8 else values,
            scales=scales.contiguous(),
            dtype=self._like.dtype,
        )


def quantise_rows(code: Code, weight: torch.Tensor, dtype: torch.dtype) -> GroupedMatrix:
    """Rounds to INT8 or FLOAT8 with a scale for each row.

    weight: float32 [out_features, in_features]; dtype: of activations.
    """
    scales = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / code.table.nan_to_num().max()
    scaled = weight / scales
    if code is FLOAT8:
        values = scaled.to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        values = (scaled.round() + 128).to(torch.uint8)
    return GroupedMatrix(code, values, scales, dtype)
