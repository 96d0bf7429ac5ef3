"""A linear's weight of quantised parts, each as its checkpoint tensors have it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from loraplex.engine.models.weights import DenseWeight, NamedPlaces

Multiply = Callable[[torch.Tensor], torch.Tensor]


class Matrix(Protocol):
    """Weights as a method has read them, [out_features, in_features], about to be laid out."""

    def join(self, below: Any) -> Matrix | None:
        """This matrix with the rows of another under it, if both can be multiplied as one."""

    def multiplier(self) -> Multiply:
        """x [num_tokens, in_features] -> x W^T, by the fastest kernel that serves the matrix.

        What it returns holds all that is left of the matrix.
        """


class Part(Protocol):
    """The rows of one checkpoint module, e.g. of the k_proj in a fused q, k and v."""

    def places(self) -> NamedPlaces:
        """Where its tensors go, by the last part of their names, e.g. "qweight". Called once."""

    def read(self) -> Matrix:
        """All tensors are in their places."""


class Method(Protocol):
    """A way of quantising, with its settings."""

    def part(
        self, module: str, out_features: int, in_features: int, like: torch.Tensor
    ) -> Part | None:
        """How the weights of a module (e.g. "model.layers.0.mlp.up_proj") are stored; None if they
        are not quantised. `like` has the dtype of activations, and the device.

        Raises ValueError for sizes that the method does not allow.
        """


class QuantisedWeight:
    """The Weight of a Linear that has quantised parts."""

    def __init__(self, parts: dict[str, Part]) -> None:
        """parts: by the last part of the module's name, in the order of rows."""
        self._parts = parts
        self._multipliers: list[Multiply] = []

    def places(self) -> NamedPlaces:
        for module, part in self._parts.items():
            for name, place in part.places():
                yield f"{module}.{name}", place

    def pack(self) -> None:
        """Neighbours become one matrix where they can: one kernel instead of several."""
        matrices: list[Matrix] = []
        for name in list(self._parts):
            matrix = self._parts.pop(name).read()
            joined = matrices[-1].join(matrix) if matrices else None
            if joined is None:
                matrices.append(matrix)
            else:
                matrices[-1] = joined
        while matrices:
            self._multipliers.append(matrices.pop(0).multiplier())

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        outputs = [multiply(x) for multiply in self._multipliers]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return y if bias is None else y.add_(bias)


class DenseMatrix:
    """Rows that are not quantised, beside some that are."""

    def __init__(self, weight: DenseWeight) -> None:
        self._weight = weight

    def join(self, below: Any) -> None:
        return None

    def multiplier(self) -> Multiply:
        self._weight.pack()
        return lambda x: self._weight.multiply(x, None)


class DensePart:
    """The part of a module that is not quantised, in a linear that has others that are."""

    def __init__(self, out_features: int, in_features: int, like: torch.Tensor) -> None:
        self._weight = DenseWeight(in_features, {"": out_features}, like)

    def places(self) -> NamedPlaces:
        for _, place in self._weight.places():
            yield "weight", place

    def read(self) -> DenseMatrix:
        return DenseMatrix(self._weight)
