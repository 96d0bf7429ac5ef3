"""The matrix of a Linear: what stores it and multiplies by it, and where its tensors go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
import torch.nn.functional as F

from loraplex.engine.models.reused_memory import ReusedMemory
from loraplex.engine.models.streamed_linear import streamed_linear

# The row count that packed weights are laid out for; other counts run on the same layout.
PACKING_ROWS = 64


class Place(Protocol):
    """Where a checkpoint tensor goes. Every torch.Tensor is one."""

    @property
    def shape(self) -> torch.Size | None:
        """That the tensor must have, dimensions of 1 aside; None: any."""

    def copy_(self, tensor: torch.Tensor, /) -> object:
        """Take the values of a tensor of this shape, converted to the dtype of the place."""


NamedPlaces = Iterator[tuple[str, Place]]


class Weight(Protocol):
    """W of shape [total out_features, in_features], in one of the ways to store it."""

    def places(self) -> NamedPlaces:
        """Where the checkpoint's tensors go, by the ends of their names, e.g. "q_proj.weight".

        Called once, for a weight that is about to be loaded: only now is its memory allocated.
        """

    def pack(self) -> None:
        """All tensors are in their places: lay them out the way `multiply` reads them fastest."""

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [num_tokens, in_features] -> x W^T + bias, [num_tokens, total out_features]."""


class DenseWeight:
    """A plain tensor; its rows are those of one or several checkpoint tensors."""

    def __init__(self, in_features: int, out_features: dict[str, int], like: torch.Tensor) -> None:
        """out_features: rows by checkpoint tensor; like: has the dtype and device to use."""
        self._shape = sum(out_features.values()), in_features
        self._out_features = out_features
        self._tensor = like
        self._memory: ReusedMemory | None = None
        self._multiply: Callable[..., torch.Tensor] = F.linear

    @classmethod
    def of(cls, tensor: torch.Tensor) -> DenseWeight:
        """One that is loaded elsewhere."""
        return cls(tensor.shape[1], {"": tensor.shape[0]}, tensor)

    def load_into(self, memory: ReusedMemory) -> None:
        """Before it is loaded, on the CPU: it needs memory of its own only when it is packed."""
        self._memory = memory

    def places(self) -> NamedPlaces:
        if self._memory is None:
            self._tensor = self._tensor.new_empty(self._shape)
        else:
            self._tensor = self._memory.empty(self._shape, self._tensor.dtype)
            self._memory = None
        parts = self._tensor.split(list(self._out_features.values()))
        for name, part in zip(self._out_features, parts, strict=True):
            yield f"{name}.weight", part

    def pack(self) -> None:
        """For the CPU, as oneDNN reads it fastest: up to three times the speed of F.linear at few
        rows, where F.linear lays out anew each call. On Hopper GPUs it stays as it is, but few rows
        are multiplied by a kernel of our own."""
        is_served = self._tensor.device.type == "cpu" and self._tensor.dtype == torch.bfloat16
        if is_served and torch.backends.mkldnn.is_available():
            self._tensor = torch.ops.mkldnn._reorder_linear_weight(self._tensor, PACKING_ROWS)
            self._multiply = _multiply_packed
        self._multiply = streamed_linear(self._tensor) or self._multiply

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self._multiply(x, self._tensor, bias)


def _multiply_packed(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
