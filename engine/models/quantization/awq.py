"""AWQ, as AutoAWQ and its followers store it (version "gemm"): Lin et al., arXiv 2306.00978."""

from __future__ import annotations

from typing import Any

import torch

from loraplex.engine.models.quantization.codes import INT4
from loraplex.engine.models.quantization.grouped import GroupedMatrix, unpack_int32
from loraplex.engine.models.quantization.settings import (
    SkippedModules,
    check_divisible,
    check_group_size,
    check_setting,
)
from loraplex.engine.models.weights import NamedPlaces

# Where each of 8 neighbouring outputs is in the int32 that holds them, in nibbles from the lowest.
NIBBLES = [0, 4, 1, 5, 2, 6, 3, 7]


class Awq:
    """The method's settings."""

    def __init__(self, config: dict[str, Any]) -> None:
        check_setting(config, "bits", (4,), 4)
        self._group_size = check_group_size(config)
        for field in ("version", "format", "checkpoint_format"):
            check_setting(config, field, ("gemm", "GEMM"), "gemm")
        check_setting(config, "zero_point", (True,), True)
        self._skipped = SkippedModules(
            ["lm_head", *(config.get("modules_to_not_convert") or ())],
        )

    def part(
        self, module: str, out_features: int, in_features: int, like: torch.Tensor
    ) -> AwqPart | None:
        if module in self._skipped:
            return None
        group_size = in_features if self._group_size == -1 else self._group_size
        check_divisible(module, "inputs", in_features, group_size)
        check_divisible(module, "outputs", out_features, len(NIBBLES))
        return AwqPart(out_features, in_features, in_features // group_size, like)


class AwqPart:
    """w = (values - zeros) * scales; values and zeros in 4 bits, packed along the outputs."""

    def __init__(
        self, out_features: int, in_features: int, num_groups: int, like: torch.Tensor
    ) -> None:
        self._sizes = out_features, in_features, num_groups
        self._like = like

    def places(self) -> NamedPlaces:
        out_features, in_features, num_groups = self._sizes
        empty = self._like.new_empty
        self._values = empty(in_features, out_features // 8, dtype=torch.int32)
        self._zeros = empty(num_groups, out_features // 8, dtype=torch.int32)
        self._scales = empty(num_groups, out_features, dtype=torch.float16)
        yield "qweight", self._values
        yield "qzeros", self._zeros
        yield "scales", self._scales

    def read(self) -> GroupedMatrix:
        scales = self._scales.T.float()
        return GroupedMatrix(
            INT4,
            values=_unpack(self._values).T.contiguous(),
            scales=scales,
            middles=scales * (8.0 - _unpack(self._zeros).T),
            dtype=self._like.dtype,
        )


def _unpack(packed: torch.Tensor) -> torch.Tensor:
    """int32 [rows, outputs / 8] -> uint8 [rows, outputs]."""
    return unpack_int32(packed, 4).unflatten(-1, (-1, 8))[..., NIBBLES].flatten(-2)
