"""GPTQ, as AutoGPTQ and GPTQModel store it: Frantar et al., arXiv 2210.17323."""

from __future__ import annotations

import re
from typing import Any

import torch

from loraplex.engine.models.quantization.codes import INT4, INT8
from loraplex.engine.models.quantization.grouped import (
    GroupedMatrix,
    sort_by_group,
    unpack_int32,
)
from loraplex.engine.models.quantization.settings import (
    SkippedModules,
    check_divisible,
    check_group_size,
    check_setting,
)
from loraplex.engine.models.weights import NamedPlaces


class Gptq:
    """The method's settings. Whether it is symmetric and whether it orders inputs by activation
    (sym, desc_act) shows in the tensors themselves."""

    def __init__(self, config: dict[str, Any]) -> None:
        check_setting(config, "pack_dtype", ("int32",), "int32")
        field = "checkpoint_format" if "checkpoint_format" in config else "format"
        version = check_setting(config, field, ("gptq", "gptq_v2"), "gptq")
        # The first version stores zero points less one.
        self._zero_shift = 1 if version == "gptq" else 0
        skipped = list(config.get("modules_in_block_to_not_quantize") or ())
        if not config.get("lm_head"):
            skipped.append("lm_head")
        self._skipped = SkippedModules(skipped)
        # GPTQModel's: what is different for modules by patterns of their names; the first counts.
        dynamic: dict[str, Any] = config.get("dynamic") or {}
        self._settings = [
            (
                pattern.removeprefix("+:").removeprefix("-:"),
                None if pattern.startswith("-:") else _bits_and_group_size({**config, **changes}),
            )
            for pattern, changes in dynamic.items()
        ]
        self._settings.append(("", _bits_and_group_size(config)))

    def part(
        self, module: str, out_features: int, in_features: int, like: torch.Tensor
    ) -> GptqPart | None:
        if module in self._skipped:
            return None
        settings = next(values for pattern, values in self._settings if re.match(pattern, module))
        if settings is None:
            return None
        bits, group_size = settings
        group_size = in_features if group_size == -1 else group_size
        check_divisible(module, "inputs", in_features, group_size)
        check_divisible(module, "inputs", in_features, 32 // bits)
        check_divisible(module, "outputs", out_features, 32 // bits)
        num_groups = in_features // group_size
        sizes = out_features, in_features, num_groups
        return GptqPart(module, sizes, bits, self._zero_shift, like)


def _bits_and_group_size(config: dict[str, Any]) -> tuple[int, int]:
    return check_setting(config, "bits", (4, 8), None), check_group_size(config)


class GptqPart:
    """w = (values - zeros) * scales, values packed along the inputs, zeros along the outputs."""

    def __init__(
        self,
        module: str,
        sizes: tuple[int, int, int],
        bits: int,
        zero_shift: int,
        like: torch.Tensor,
    ) -> None:
        """sizes: (out_features, in_features, groups)."""
        self._module = module
        self._sizes = sizes
        self._bits = bits
        self._zero_shift = zero_shift
        self._like = like

    def places(self) -> NamedPlaces:
        out_features, in_features, num_groups = self._sizes
        empty, per_int32 = self._like.new_empty, 32 // self._bits
        self._values = empty(in_features // per_int32, out_features, dtype=torch.int32)
        self._zeros = empty(num_groups, out_features // per_int32, dtype=torch.int32)
        self._scales = empty(num_groups, out_features, dtype=torch.float16)
        inputs = torch.arange(in_features, dtype=torch.int32, device=self._like.device)
        self._groups = inputs // (in_features // num_groups)
        yield "qweight", self._values
        yield "qzeros", self._zeros
        yield "scales", self._scales
        yield "g_idx", self._groups

    def read(self) -> GroupedMatrix:
        values = unpack_int32(self._values.T, self._bits)
        order = sort_by_group(f"{self._module}.g_idx", self._groups.long(), self._sizes[2])
        zeros = unpack_int32(self._zeros, self._bits).T + self._zero_shift & 2**self._bits - 1
        scales = self._scales.T.float()
        offsets = 2.0 ** (self._bits - 1) - zeros
        return GroupedMatrix(
            INT4 if self._bits == 4 else INT8,
            values=values if order is None else values[:, order],
            scales=scales,
            middles=scales * offsets if offsets.any() else None,
            dtype=self._like.dtype,
            order=order,
        )
