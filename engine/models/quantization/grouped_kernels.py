"""Kernels for a GroupedMatrix: what each serves, the layout it wants, and its product.

x [num_tokens, in_features] -> x W^T, [num_tokens, out_features].
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F

from loraplex import native
from loraplex.engine.models.quantization.codes import FLOAT8, FP4, INT4, INT8, NF4, Code

if TYPE_CHECKING:
    from loraplex.engine.models.quantization.grouped import GroupedMatrix

Tensor = torch.Tensor
# That torch's kernel for 4 bits serves.
GROUP_SIZES = (32, 64, 128, 256)
FLOAT8_MAX = 448.0


class Kernel(Protocol):
    """A layout of a matrix, and its product."""

    def __init__(self, matrix: GroupedMatrix) -> None: ...

    @staticmethod
    def serves(matrix: GroupedMatrix) -> bool: ...

    def __call__(self, x: Tensor) -> Tensor: ...


class CpuGrouped:
    """The native library's kernel for few rows; for many, the weights in full and a product of
    those."""

    # Inputs, by bits.
    BLOCKS = {4: 32, 8: 16}
    MAX_ROWS = 16

    @staticmethod
    def serves(matrix: GroupedMatrix) -> bool:
        block = CpuGrouped.BLOCKS[matrix.code.bits]
        return matrix.values.is_cpu and matrix.group_size % block == 0

    def __init__(self, matrix: GroupedMatrix) -> None:
        self._shape = matrix.values.shape
        values, table = matrix.values, None
        if matrix.code.bits == 4:
            low, high = values.unflatten(1, (-1, 2, self.BLOCKS[4] // 2)).unbind(2)
            values, table = (low | high << 4).flatten(1), matrix.code.table
        scales = matrix.scales.to(matrix.dtype).contiguous()
        middles = None
        if matrix.middles is not None:
            middles = matrix.middles.to(matrix.dtype).contiguous()
        self._weights = values.contiguous(), scales, middles, table, matrix.code is FLOAT8

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] > self.MAX_ROWS:
            weight = x.new_empty(self._shape)
            native.grouped_expand(weight, *self._weights)
            return F.linear(x, weight)
        y = x.new_empty(x.shape[0], self._shape[0])
        native.grouped_linear(y, x.float().contiguous(), *self._weights)
        return y


class CudaInt4:
    """torch's kernel for few rows; for many, the weights in full and a product of those."""

    INNER_TILES = 8
    MAX_ROWS = 32

    @staticmethod
    def serves(matrix: GroupedMatrix) -> bool:
        out_features, in_features = matrix.values.shape
        is_aligned = out_features % 8 == 0 and in_features % (16 * CudaInt4.INNER_TILES) == 0
        is_aligned = is_aligned and matrix.group_size in GROUP_SIZES
        return _is_bfloat16(matrix, INT4) and is_aligned

    def __init__(self, matrix: GroupedMatrix) -> None:
        self._group_size = matrix.group_size
        pairs = matrix.values[:, ::2] << 4 | matrix.values[:, 1::2]
        self._packed = torch.ops.aten._convert_weight_to_int4pack(pairs, self.INNER_TILES)
        self._scales = _scales_and_middles(matrix)

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


class CudaFloat8:
    """The tensor cores' product in float8, for which each row of x is quantised too."""

    @staticmethod
    def serves(matrix: GroupedMatrix) -> bool:
        is_aligned = matrix.values.shape[0] % 16 == 0 and matrix.values.shape[1] % 16 == 0
        return (
            _is_bfloat16(matrix, FLOAT8)
            and _has_plain_rows(matrix)
            and is_aligned
            and torch.cuda.get_device_capability(matrix.values.device) >= (8, 9)
        )

    def __init__(self, matrix: GroupedMatrix) -> None:
        self._weight = matrix.values.view(torch.float8_e4m3fn).T
        self._scales = matrix.scales.view(1, -1)

    def __call__(self, x: Tensor) -> Tensor:
        scales = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / FLOAT8_MAX
        quantised = (x / scales).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn)
        return torch._scaled_mm(
            quantised, self._weight, scale_a=scales, scale_b=self._scales, out_dtype=x.dtype
        )


class CudaInt8:
    """torch's kernel for a signed integer per weight and a scale per row, for few rows."""

    MAX_ROWS = 16

    @staticmethod
    def serves(matrix: GroupedMatrix) -> bool:
        return _is_bfloat16(matrix, INT8) and _has_plain_rows(matrix)

    def __init__(self, matrix: GroupedMatrix) -> None:
        self._values = _signed(matrix.values)
        self._scales = matrix.scales[:, 0].to(matrix.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] > self.MAX_ROWS:
            return F.linear(x, self._values.to(x.dtype)) * self._scales
        return torch.ops.aten._weight_int8pack_mm(x.contiguous(), self._values, self._scales)


class CudaBitsAndBytes:
    """bitsandbytes' kernels, where it is installed."""

    GROUP_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

    @staticmethod
    def serves(matrix: GroupedMatrix) -> bool:
        return (
            matrix.values.is_cuda
            and matrix.code in (NF4, FP4)
            and matrix.group_size in CudaBitsAndBytes.GROUP_SIZES
            and importlib.util.find_spec("bitsandbytes") is not None
        )

    def __init__(self, matrix: GroupedMatrix) -> None:
        from bitsandbytes.functional import QuantState

        # Of two neighbours, it has the first in the high four bits.
        self._packed = (matrix.values[:, ::2] << 4 | matrix.values[:, 1::2]).view(-1, 1)
        self._state = QuantState(
            absmax=matrix.scales.flatten(),
            shape=matrix.values.shape,
            code=matrix.code.table.to(matrix.values.device),
            blocksize=matrix.group_size,
            quant_type=matrix.code.name,
            dtype=matrix.dtype,
        )

    def __call__(self, x: Tensor) -> Tensor:
        from bitsandbytes import matmul_4bit

        return matmul_4bit(x, self._packed.t(), quant_state=self._state)


class Dequantised:
    """Where no kernel serves: the weights in full for every product."""

    @staticmethod
    def serves(matrix: GroupedMatrix) -> bool:
        return True

    def __init__(self, matrix: GroupedMatrix) -> None:
        self._code = matrix.code
        self._values = matrix.values
        if self._code.bits == 4:
            self._values = matrix.values[:, ::2] | matrix.values[:, 1::2] << 4
        self._table = _pairs(self._code).to(matrix.values.device, matrix.dtype)
        self._scales = matrix.scales.to(matrix.dtype).unsqueeze(-1)
        self._middles = None
        if matrix.middles is not None:
            self._middles = matrix.middles.to(matrix.dtype).unsqueeze(-1)

    def __call__(self, x: Tensor) -> Tensor:
        weight = self._decode(x.dtype).view(*self._scales.shape[:2], -1)
        if self._middles is None:
            weight = weight.mul_(self._scales)
        else:
            weight = torch.addcmul(self._middles, weight, self._scales)
        return F.linear(x, weight.flatten(1))

    def _decode(self, dtype: torch.dtype) -> Tensor:
        """What the values stand for before they are scaled, [out_features, in_features]."""
        if self._code is INT8:
            return _signed(self._values).to(dtype)
        if self._code is FLOAT8:
            return self._values.view(torch.float8_e4m3fn).to(dtype)
        return F.embedding(self._values.int(), self._table).flatten(1)


def _pairs(code: Code) -> Tensor:
    """[256, 2]: what the two values in a byte stand for, if the code has 4 bits."""
    both = torch.cartesian_prod(code.table, code.table) if code.bits == 4 else torch.empty(0, 2)
    return both.flip(-1)


def _signed(values: Tensor) -> Tensor:
    """Of INT8: uint8 -> int8 values - 128."""
    return (values ^ 128).view(torch.int8)


def _scales_and_middles(matrix: GroupedMatrix) -> Tensor:
    """[groups, out_features, 2], as torch's kernel for 4 bits wants it."""
    pairs = torch.stack([matrix.scales, matrix.all_middles()], dim=-1)
    return pairs.transpose(0, 1).to(matrix.dtype).contiguous()


def _is_bfloat16(matrix: GroupedMatrix, code: Code) -> bool:
    """And on a CUDA device."""
    return matrix.values.is_cuda and matrix.code is code and matrix.dtype == torch.bfloat16


def _has_plain_rows(matrix: GroupedMatrix) -> bool:
    """Nothing but a scale for each row."""
    return matrix.scales.shape[1] == 1 and matrix.middles is None


KERNELS: tuple[type[Kernel], ...] = (
    CpuGrouped, CudaInt4, CudaFloat8, CudaInt8, CudaBitsAndBytes, Dequantised,
)  # fmt: skip
