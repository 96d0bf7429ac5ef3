"""bitsandbytes: nf4, fp4 and int8, from checkpoints that it wrote and from plain ones on load.

Its format is read and written here; the package is only needed for its CUDA kernels.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from loraplex.engine.models.quantization.codes import FP4, INT8, NF4, Code
from loraplex.engine.models.quantization.eight_bits import EightBitPart, quantise_rows
from loraplex.engine.models.quantization.grouped import GroupedMatrix, unpack_nibbles
from loraplex.engine.models.quantization.on_load import OnLoadPart
from loraplex.engine.models.quantization.settings import (
    SkippedModules,
    check_divisible,
    check_setting,
    unsupported,
)
from loraplex.engine.models.quantization.weight import Part
from loraplex.engine.models.weights import NamedPlaces

CODES_OF_4_BITS = {"nf4": NF4, "fp4": FP4}
GROUP_SIZE = 64
# Scales that share a scale of their own.
NESTED_GROUP_SIZE = 256


class BitsAndBytes:
    """Checkpoints that were saved quantised."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._code = INT8
        if config.get("load_in_4bit"):
            kind = check_setting(config, "bnb_4bit_quant_type", CODES_OF_4_BITS, "fp4")
            check_setting(config, "bnb_4bit_quant_storage", ("uint8",), "uint8")
            self._code = CODES_OF_4_BITS[kind]
        elif not config.get("load_in_8bit"):
            raise unsupported("load_in_8bit", config.get("load_in_8bit"), "true, or load_in_4bit")
        self._is_nested = bool(config.get("bnb_4bit_use_double_quant"))
        self._skipped = SkippedModules(["lm_head", *(config.get("llm_int8_skip_modules") or ())])

    def part(
        self, module: str, out_features: int, in_features: int, like: torch.Tensor
    ) -> Part | None:
        if module in self._skipped:
            return None
        sizes = out_features, in_features
        if self._code is INT8:
            return _Int8Part(INT8, sizes, ("SCB", (out_features,)), like, unused=("weight_format",))
        check_divisible(module, "inputs", in_features, GROUP_SIZE)
        return FourBitPart(self._code, sizes, self._is_nested, like)


class BitsAndBytesOnLoad:
    """Every linear but the head."""

    def __init__(self, kind: str) -> None:
        """kind: nf4, fp4 or int8."""
        self._code = INT8 if kind == "int8" else CODES_OF_4_BITS[kind]

    def part(
        self, module: str, out_features: int, in_features: int, like: torch.Tensor
    ) -> OnLoadPart | None:
        if module == "lm_head":
            return None
        if self._code is INT8:
            return OnLoadPart(
                out_features, in_features, like, lambda w: quantise_rows(INT8, w, like.dtype)
            )
        if in_features % GROUP_SIZE:
            raise ValueError(
                f"quantization='bitsandbytes' is not allowed: {module} of this model has "
                f"{in_features} inputs, which is no multiple of {GROUP_SIZE}"
            )
        return OnLoadPart(
            out_features, in_features, like, lambda w: quantise_groups(self._code, w, like.dtype)
        )


class _Int8Part(EightBitPart):
    """Its scale is the largest value of a row, which 127 stands for."""

    def read(self) -> GroupedMatrix:
        self._scales /= 127
        return super().read()


class FourBitPart:
    """Rows one after another, two weights in a byte, in groups of 64 with their largest value."""

    def __init__(
        self, code: Code, sizes: tuple[int, int], is_nested: bool, like: torch.Tensor
    ) -> None:
        self._code = code
        self._sizes = sizes
        self._is_nested = is_nested
        self._like = like

    def places(self) -> NamedPlaces:
        empty, size = self._like.new_empty, self._sizes[0] * self._sizes[1]
        num_groups = size // GROUP_SIZE
        scale_dtype = torch.uint8 if self._is_nested else torch.float32
        self._values = empty(size // 2, 1, dtype=torch.uint8)
        self._scales = empty(num_groups, dtype=scale_dtype)
        self._settings = SettingsPlace()
        yield "weight", self._values
        yield "weight.absmax", self._scales
        yield "weight.quant_map", empty(16, dtype=torch.float32)
        yield f"weight.quant_state.bitsandbytes__{self._code.name}", self._settings
        if self._is_nested:
            num_nested = -(-num_groups // NESTED_GROUP_SIZE)
            self._nested_scales = empty(num_nested, dtype=torch.float32)
            self._nested_table = empty(256, dtype=torch.float32)
            yield "weight.nested_absmax", self._nested_scales
            yield "weight.nested_quant_map", self._nested_table

    def read(self) -> GroupedMatrix:
        settings = self._settings.values
        check_setting(settings, "blocksize", (GROUP_SIZE,), GROUP_SIZE)
        scales = self._scales
        if self._is_nested:
            check_setting(settings, "nested_blocksize", (NESTED_GROUP_SIZE,), NESTED_GROUP_SIZE)
            factors = self._nested_scales.repeat_interleave(NESTED_GROUP_SIZE)[: len(scales)]
            scales = self._nested_table[scales.long()] * factors + settings["nested_offset"]
        pairs = self._values.view(self._sizes[0], -1)
        return GroupedMatrix(
            self._code,
            # Of two neighbours, the first is in the high four bits.
            values=unpack_nibbles(pairs << 4 | pairs >> 4),
            scales=scales.view(self._sizes[0], -1),
            dtype=self._like.dtype,
        )


class SettingsPlace:
    """Takes a JSON object as bytes, of any length."""

    shape = None

    def copy_(self, tensor: torch.Tensor, /) -> None:
        self.values: dict[str, Any] = json.loads(bytes(tensor.tolist()))


def quantise_groups(code: Code, weight: torch.Tensor, dtype: torch.dtype) -> GroupedMatrix:
    """Rounds to NF4 or FP4; weight: float32 [out_features, in_features]."""
    groups = weight.unflatten(1, (-1, GROUP_SIZE))
    scales = groups.abs().amax(-1)
    table, order = code.table.to(weight.device).sort()
    middles = (table[1:] + table[:-1]) / 2
    nearest = torch.bucketize(groups / scales.clamp(min=1e-12).unsqueeze(-1), middles)
    return GroupedMatrix(code, order.byte()[nearest].flatten(1), scales, dtype)
