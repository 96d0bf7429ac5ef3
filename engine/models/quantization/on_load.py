"""Parts of a plain checkpoint that are quantised as they are loaded, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch

from loraplex.engine.models.quantization.grouped import GroupedMatrix
from loraplex.engine.models.weights import NamedPlaces

Quantise = Callable[[torch.Tensor], GroupedMatrix]


class OnLoadPart:
    """A Part, and the Place of its one tensor."""

    def __init__(
        self, out_features: int, in_features: int, like: torch.Tensor, quantise: Quantise
    ) -> None:
        """quantise: is given float32 [out_features, in_features] on the device of `like`."""
        self.shape = torch.Size((out_features, in_features))
        self._device = like.device
        self._quantise = quantise

    def places(self) -> NamedPlaces:
        yield "weight", self

    def copy_(self, tensor: torch.Tensor, /) -> None:
        self._matrix = self._quantise(tensor.to(self._device, torch.float32))

    def read(self) -> GroupedMatrix:
        return self._matrix
