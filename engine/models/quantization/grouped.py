"""Weights of 4 or 8 bits whose scales are shared by groups of inputs: what most methods store.

w[n, k] = table[values[n, k]] * scales[n, g] + middles[n, g], where g is the group of input k and
table that of the code. For integers the table begins at -8 or -128, so that middles are 0
for methods that are symmetric, and small for most others: they may be rounded as scales are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from loraplex.engine.models.quantization.codes import Code
from loraplex.engine.models.quantization.grouped_kernels import KERNELS
from loraplex.engine.models.quantization.weight import Multiply

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class GroupedMatrix:
    """Unpacked, for as long as it takes to lay it out for a kernel."""

    code: Code
    values: Tensor  # uint8 [out_features, in_features]
    scales: Tensor  # float32 [out_features, groups]
    dtype: torch.dtype
    """Of activations and results."""
    middles: Tensor | None = None  # float32 [out_features, groups]; None: 0
    order: Tensor | None = None
    """int64 [in_features]: the input that each column of values belongs to; None: as they come."""

    @property
    def group_size(self) -> int:
        return self.values.shape[1] // self.scales.shape[1]

    def join(self, below: object) -> GroupedMatrix | None:
        if not isinstance(below, GroupedMatrix) or self.code is not below.code:
            return None
        if self.scales.shape[1] != below.scales.shape[1] or not _same(self.order, below.order):
            return None
        middles = None
        if self.middles is not None or below.middles is not None:
            middles = torch.cat([self.all_middles(), below.all_middles()])
        return replace(
            self,
            values=torch.cat([self.values, below.values]),
            scales=torch.cat([self.scales, below.scales]),
            middles=middles,
        )

    def multiplier(self) -> Multiply:
        multiply = next(kernel for kernel in KERNELS if kernel.serves(self))(self)
        order = self.order
        if order is None:
            return multiply
        return lambda x: multiply(x.index_select(1, order))

    def all_middles(self) -> Tensor:
        return torch.zeros_like(self.scales) if self.middles is None else self.middles


def unpack_nibbles(packed: Tensor) -> Tensor:
    """uint8 [..., n] -> uint8 [..., 2 n], the low four bits first."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def unpack_int32(packed: Tensor, bits: int) -> Tensor:
    """int32 [..., n] -> uint8 [..., n * 32 / bits], the lowest bits first."""
    data = packed.contiguous().view(torch.uint8)
    return data if bits == 8 else unpack_nibbles(data)


def sort_by_group(name: str, groups: Tensor, num_groups: int) -> Tensor | None:
    """The order that puts inputs of a group side by side; None if they are.

    groups: int64 [in_features], the group of every input; name: of the tensor they are from. Raises
    ValueError if groups differ in size.
    """
    group_size = len(groups) // num_groups
    # A share of the inputs has a share of the groups.
    groups = groups - groups.min()
    in_turn = torch.arange(len(groups), device=groups.device) // group_size
    # Checkpoints from before there was an order have zeros.
    if torch.equal(groups, in_turn) or not groups.any():
        return None
    order = groups.argsort(stable=True)
    if not torch.equal(groups[order], in_turn):
        raise ValueError(
            f"tensor {name!r} of the checkpoint must have every group from 0 to {num_groups - 1} "
            f"{group_size} times"
        )
    return order


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)
