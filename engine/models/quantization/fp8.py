"""FP8 (e4m3): checkpoints with a scale per tensor, per row or per block, and plain ones on load.

On GPUs whose tensor cores have it, each row of activations is quantised too, by its own largest
value; a checkpoint's scale for activations (activation_scheme "static") is not needed for that.
"""

from __future__ import annotations

from typing import Any

import torch

from loraplex.engine.models.quantization.codes import FLOAT8
from loraplex.engine.models.quantization.eight_bits import EightBitPart, quantise_rows
from loraplex.engine.models.quantization.on_load import OnLoadPart
from loraplex.engine.models.quantization.settings import (
    SkippedModules,
    check_divisible,
    check_setting,
    unsupported,
)


class Fp8:
    """Checkpoints of quant_method "fp8", with a scale per tensor or per block."""

    def __init__(self, config: dict[str, Any]) -> None:
        check_setting(config, "fmt", ("e4m3",), "e4m3")
        scheme = check_setting(config, "activation_scheme", ("dynamic", "static"), "dynamic")
        # transformers writes this field, and has names of its own.
        is_of_transformers = "weight_block_size" in config
        self._scale = "weight_scale_inv" if is_of_transformers else "weight_scale"
        unused = "activation_scale" if is_of_transformers else "input_scale"
        self._unused = (unused,) if scheme == "static" else ()
        self._block = _block_size(config)
        skipped = config.get("modules_to_not_convert") or config.get("ignored_layers") or ()
        self._skipped = SkippedModules(["lm_head", *skipped])

    def part(
        self, module: str, out_features: int, in_features: int, like: torch.Tensor
    ) -> EightBitPart | None:
        if module in self._skipped:
            return None
        sizes = out_features, in_features
        if self._block is None:
            return EightBitPart(FLOAT8, sizes, (self._scale, ()), like, unused=self._unused)
        rows, columns = self._block
        check_divisible(module, "inputs", in_features, columns)
        shape = -(-out_features // rows), in_features // columns
        return EightBitPart(FLOAT8, sizes, (self._scale, shape), like, self._block, self._unused)


class FbgemmFp8:
    """Checkpoints of quant_method "fbgemm_fp8", with a scale per row."""

    def __init__(self, config: dict[str, Any]) -> None:
        skipped = config.get("modules_to_not_convert") or ()
        self._skipped = SkippedModules(["lm_head", *skipped])

    def part(
        self, module: str, out_features: int, in_features: int, like: torch.Tensor
    ) -> EightBitPart | None:
        if module in self._skipped:
            return None
        scale = "weight_scale", (out_features, 1)
        return EightBitPart(FLOAT8, (out_features, in_features), scale, like)


class Fp8OnLoad:
    """Every linear but the head, with a scale per row."""

    def part(
        self, module: str, out_features: int, in_features: int, like: torch.Tensor
    ) -> OnLoadPart | None:
        if module == "lm_head":
            return None
        return OnLoadPart(
            out_features, in_features, like, lambda w: quantise_rows(FLOAT8, w, like.dtype)
        )


def _block_size(config: dict[str, Any]) -> tuple[int, int] | None:
    value = config.get("weight_block_size")
    if value is None:
        return None
    if not (isinstance(value, list) and len(value) == 2 and all(n >= 1 for n in value)):
        raise unsupported("weight_block_size", value, "absent, or a list of two sizes")
    return value[0], value[1]
