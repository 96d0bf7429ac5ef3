"""Weights of 4 or 8 bits in groups along the inputs: what AWQ, GPTQ and others have in common.

w[n, k] = scales[n, g] * values[n, k] + minimums[n, g], where g is the group of input k.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from loraplex.engine.models.quantization.weight import Multiply

Tensor = torch.Tensor
KERNEL_GROUP_SIZES = (32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class IntegerMatrix:
    """Unpacked, for as long as it takes to lay it out for a kernel."""

    values: Tensor  # uint8 [out_features, in_features], below 2 ** bits
    scales: Tensor  # [out_features, groups]
    minimums: Tensor  # [out_features, groups]: what a value of zero stands for
    bits: int
    dtype: torch.dtype
    """Of activations and results."""
    order: Tensor | None = None
    """int64 [in_features]: the input that each column of values belongs to; None: as they come."""

    @property
    def group_size(self) -> int:
        return self.values.shape[1] // self.scales.shape[1]

    def join(self, below: object) -> IntegerMatrix | None:
        if not isinstance(below, IntegerMatrix):
            return None
        if (self.bits, self.scales.shape[1]) != (below.bits, below.scales.shape[1]):
            return None
        if not _same(self.order, below.order):
            return None
        return replace(
            self,
            values=torch.cat([self.values, below.values]),
            scales=torch.cat([self.scales, below.scales]),
            minimums=torch.cat([self.minimums, below.minimums]),
        )

    def multiplier(self) -> Multiply:
        multiply = self._multiplier_in_order()
        order = self.order
        if order is None:
            return multiply
        return lambda x: multiply(x.index_select(1, order))

    def _multiplier_in_order(self) -> Multiply:
        if self.bits == 4 and self.dtype == torch.bfloat16:
            out_features, in_features = self.values.shape
            if self.group_size in KERNEL_GROUP_SIZES:
                if self.values.is_cuda and out_features % 8 == 0 and in_features % 128 == 0:
                    return CudaInt4(self)
                if not self.values.is_cuda and out_features % 16 == 0:
                    return CpuInt4(self)
        return Dequantised(self)

    def scales_and_middles(self) -> Tensor:
        """[groups, out_features, 2], as torch's kernels for 4 bits want it: what 8 stands for is
        their zero point."""
        middles = self.minimums.float() + 8 * self.scales.float()
        pairs = torch.stack([self.scales.float(), middles], dim=-1)
        return pairs.transpose(0, 1).to(self.dtype).contiguous()


class CpuInt4:
    """torch's kernel for the CPU."""

    def __init__(self, matrix: IntegerMatrix) -> None:
        self._group_size = matrix.group_size
        self._packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(matrix.values.int(), 1)
        self._scales = matrix.scales_and_middles()

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.contiguous(), self._packed, self._group_size, self._scales
        )


class CudaInt4:
    """torch's kernel for few rows; for many, the weights in full and a product of those."""

    INNER_TILES = 8
    MAX_ROWS = 32

    def __init__(self, matrix: IntegerMatrix) -> None:
        self._group_size = matrix.group_size
        pairs = matrix.values[:, ::2] << 4 | matrix.values[:, 1::2]
        self._packed = torch.ops.aten._convert_weight_to_int4pack(pairs, self.INNER_TILES)
        self._scales = matrix.scales_and_middles()

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] > self.MAX_ROWS:
            return F.linear(x, self.dequantise())
        return torch.ops.aten._weight_int4pack_mm(
            x.contiguous(), self._packed, self._group_size, self._scales
        )

    def dequantise(self) -> Tensor:
        """[out_features, in_features], from the kernel's layout, which is that of the tensor cores'
        m16n8k16: a lane has 2 neighbours of k in each 8, of 2 tiles of 16; of those the odd ones
        come after the even ones, and within them the second tile after the first."""
        tiles, outer = self._packed.shape[:2]
        data = self._packed.view(torch.uint8)
        # [tiles, outer, 8 n, 4 pairs of k, tiles of 32 k, odd, 16, 8]
        values = torch.stack([data & 15, data >> 4], dim=-1)
        values = values.view(tiles, outer, 8, 4, self.INNER_TILES // 2, 2, 2, 2)
        values = values.permute(0, 2, 1, 4, 6, 7, 3, 5).reshape(tiles * 8, -1, self._group_size)
        scales, middles = self._scales.transpose(0, 1).unsqueeze(-2).unbind(-1)
        return torch.addcmul(middles, values.to(scales.dtype) - 8, scales).flatten(1)


class Dequantised:
    """No kernel serves these: the weights in full for every product."""

    def __init__(self, matrix: IntegerMatrix) -> None:
        self._bits = matrix.bits
        self._values = matrix.values
        if self._bits == 4:
            self._values = matrix.values[:, ::2] | matrix.values[:, 1::2] << 4
        self._scales = matrix.scales.to(matrix.dtype).unsqueeze(-1)
        self._minimums = matrix.minimums.to(matrix.dtype).unsqueeze(-1)

    def __call__(self, x: Tensor) -> Tensor:
        values = self._values
        if self._bits == 4:
            values = torch.stack([values & 15, values >> 4], dim=-1)
        values = values.view(*self._scales.shape[:2], -1).to(self._scales.dtype)
        return F.linear(x, torch.addcmul(self._minimums, values, self._scales).flatten(1))


def unpack_int32(packed: Tensor, bits: int) -> Tensor:
    """int32 [..., n] -> uint8 [..., n * 32 / bits], the lowest bits first."""
    data = packed.contiguous().view(torch.uint8)
    return data if bits == 8 else torch.stack([data & 15, data >> 4], dim=-1).flatten(-2)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)
