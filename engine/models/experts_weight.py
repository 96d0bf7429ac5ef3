"""The matrices of ExpertLinears: what stores them and multiplies by them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import torch

from loraplex.engine.models import ops
from loraplex.engine.models.weights import NamedPlaces, Weight

Tensor = torch.Tensor


class ExpertsWeight(Protocol):
    """A W [total out_features, in_features] of each expert, in one of the ways to store them."""

    def places(self) -> NamedPlaces:
        """As of a Weight, with the expert before the names: "3.up_proj.weight"."""

    def pack(self) -> None:
        """As of a Weight."""

    def multiply(self, x: Tensor, ends: Tensor) -> Tensor:
        """x [num_rows, in_features] -> [num_rows, total out_features], where ends, int32
        [num_experts], says where each expert's rows end."""


class DenseExperts:
    """One plain tensor."""

    def __init__(
        self, num_experts: int, in_features: int, out_features: dict[str, int], like: Tensor
    ) -> None:
        """out_features: rows by checkpoint tensor of an expert; like: has the dtype and device to
        use."""
        self._shape = num_experts, sum(out_features.values()), in_features
        self._out_features = out_features
        self._tensor = like

    @classmethod
    def of(cls, tensor: Tensor) -> DenseExperts:
        """One that is loaded elsewhere, [num_experts, out_features, in_features]."""
        num_experts, out_features, in_features = tensor.shape
        return cls(num_experts, in_features, {"": out_features}, tensor)

    def places(self) -> NamedPlaces:
        self._tensor = self._tensor.new_empty(self._shape)
        for expert, weight in enumerate(self._tensor):
            parts = weight.split(list(self._out_features.values()))
            for name, part in zip(self._out_features, parts, strict=True):
                yield f"{expert}.{name}.weight", part

    def pack(self) -> None:
        """It stays as it is."""

    def multiply(self, x: Tensor, ends: Tensor) -> Tensor:
        return ops.grouped_linear(x, self._tensor, ends)


class SeparateExperts:
    """A weight for each expert, multiplied one after the other. For the CPU: it asks for the ends,
    which elsewhere would be to wait."""

    def __init__(self, weights: Sequence[Weight], out_features: int, like: Tensor) -> None:
        """like: has the dtype of results."""
        self._weights = weights
        self._out_features = out_features
        self._like = like

    def places(self) -> NamedPlaces:
        for expert, weight in enumerate(self._weights):
            for name, place in weight.places():
                yield f"{expert}.{name}", place

    def pack(self) -> None:
        for weight in self._weights:
            weight.pack()

    def multiply(self, x: Tensor, ends: Tensor) -> Tensor:
        y = self._like.new_empty(len(x), self._out_features)
        for weight, (begin, end) in zip(self._weights, pairwise([0, *ends.tolist()]), strict=True):
            if begin < end:
                y[begin:end] = weight.multiply(x[begin:end], None)
        return y
