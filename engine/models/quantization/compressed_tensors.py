"""compressed-tensors, what LLM Compressor writes: integers packed in int32, int8 and FP8.

Groups of modules each have their settings. Activations stay as they are, whatever the checkpoint
says of them, except where fp8.py says otherwise.
"""

from __future__ import annotations

from typing import Any

import torch

from loraplex.engine.models.quantization.codes import FLOAT8, INT4, INT8, Code
from loraplex.engine.models.quantization.eight_bits import EightBitPart
from loraplex.engine.models.quantization.grouped import (
    GroupedMatrix,
    sort_by_group,
    unpack_int32,
)
from loraplex.engine.models.quantization.settings import (
    SkippedModules,
    check_divisible,
    check_setting,
    unsupported,
)
from loraplex.engine.models.quantization.weight import Part
from loraplex.engine.models.weights import NamedPlaces

FORMATS = ("pack-quantized", "float-quantized", "int-quantized", "naive-quantized")
# All the modules that may be quantised are of this class.
CLASS_OF_MODULES = "Linear"


class CompressedTensors:
    """The settings of each group of modules."""

    def __init__(self, config: dict[str, Any]) -> None:
        check_setting(config.get("sparsity_config") or {}, "format", ("dense",), "dense")
        check_setting(config, "kv_cache_scheme", (None,), None)
        rotations = config.get("transform_config") or {}
        if rotations.get("config_groups"):
            raise unsupported("transform_config", rotations, "absent")
        self._ignored = SkippedModules(config.get("ignore") or ())
        self._groups: list[tuple[SkippedModules, ModuleSettings]] = []
        of_class: list[tuple[SkippedModules, ModuleSettings]] = []
        for group in config["config_groups"].values():
            if group.get("weights") is None:
                continue
            settings = ModuleSettings(group, group.get("format") or config.get("format"))
            self._groups.append((SkippedModules(group["targets"]), settings))
            if CLASS_OF_MODULES in group["targets"]:
                of_class.append((SkippedModules(["re:"]), settings))
        # Names count more than the class.
        self._groups += of_class

    def part(
        self, module: str, out_features: int, in_features: int, like: torch.Tensor
    ) -> Part | None:
        if module in self._ignored:
            return None
        for targets, settings in self._groups:
            if module in targets:
                return settings.part(module, (out_features, in_features), like)
        return None


class ModuleSettings:
    """How one group of modules is stored."""

    def __init__(self, group: dict[str, Any], storage: str | None) -> None:
        """group: one of config_groups; storage: its format."""
        check_setting({"format": storage}, "format", FORMATS, None)
        weights = group["weights"]
        kind = check_setting(weights, "type", ("int", "float"), "int")
        self._is_packed = storage == "pack-quantized"
        self._bits = check_setting(weights, "num_bits", (4, 8) if self._is_packed else (8,), None)
        if self._is_packed:
            check_setting(weights, "type", ("int",), "int")
        self._code = FLOAT8 if kind == "float" else INT4 if self._bits == 4 else INT8
        strategies = ("tensor", "channel", "group", *(() if self._is_packed else ("block",)))
        self._strategy = check_setting(weights, "strategy", strategies, "tensor")
        self._group_size = weights.get("group_size")
        self._block = weights.get("block_structure")
        allowed = (True, False) if self._is_packed else (True,)
        self._is_symmetric = check_setting(weights, "symmetric", allowed, True)
        order = check_setting(weights, "actorder", (None, "weight", "static", "group"), None)
        self._has_order = order == "group"
        activations = group.get("input_activations") or {"dynamic": True}
        self._unused = () if activations.get("dynamic") else ("input_scale",)

    def part(self, module: str, sizes: tuple[int, int], like: torch.Tensor) -> Part:
        """sizes: (out_features, in_features)."""
        columns = sizes[1]
        block = None
        shape = {"tensor": (1,), "channel": (sizes[0], 1)}.get(self._strategy)
        if shape is None:
            rows, columns = self._block if self._strategy == "block" else (1, self._group_size)
            check_divisible(module, "inputs", sizes[1], columns)
            block = rows, columns
            shape = -(-sizes[0] // rows), sizes[1] // columns
        if not self._is_packed:
            scale = "weight_scale", shape
            return EightBitPart(self._code, sizes, scale, like, block, self._unused)
        check_divisible(module, "inputs", sizes[1], 32 // self._bits)
        return PackedPart(
            module, self._code, sizes, shape, self._is_symmetric, self._has_order, like
        )


class PackedPart:
    """Integers in int32 along the inputs; zero points along the outputs."""

    def __init__(
        self,
        module: str,
        code: Code,
        sizes: tuple[int, int],
        scale_shape: tuple[int, ...],
        is_symmetric: bool,
        has_order: bool,
        like: torch.Tensor,
    ) -> None:
        self._module = module
        self._code = code
        self._sizes = sizes
        self._scale_shape = scale_shape
        self._is_symmetric = is_symmetric
        self._has_order = has_order
        self._like = like

    def places(self) -> NamedPlaces:
        (out_features, in_features), per_int32 = self._sizes, 32 // self._code.bits
        empty = self._like.new_empty
        self._values = empty(out_features, in_features // per_int32, dtype=torch.int32)
        self._scales = empty(self._scale_shape, dtype=torch.float32)
        yield "weight_packed", self._values
        yield "weight_scale", self._scales
        yield "weight_shape", empty(2, dtype=torch.int64)
        if not self._is_symmetric:
            rows, num_groups = -(-self._scale_shape[0] // per_int32), self._scale_shape[-1]
            self._zeros = empty(rows, num_groups, dtype=torch.int32)
            yield "weight_zero_point", self._zeros
        if self._has_order:
            self._groups = empty(in_features, dtype=torch.int32)
            yield "weight_g_idx", self._groups

    def read(self) -> GroupedMatrix:
        out_features = self._sizes[0]
        scales, middles = self._scales.view(len(self._scales), -1), None
        if not self._is_symmetric:
            zeros = unpack_int32(self._zeros.T, self._code.bits)[:, : len(scales)].T
            middles = scales * (2.0 ** (self._code.bits - 1) - zeros)
            middles = middles.expand(out_features, -1).contiguous()
        values = unpack_int32(self._values, self._code.bits)
        order = None
        if self._has_order:
            name = f"{self._module}.weight_g_idx"
            order = sort_by_group(name, self._groups.long(), scales.shape[1])
        return GroupedMatrix(
            self._code,
            values=values if order is None else values[:, order],
            scales=scales.expand(out_features, -1).contiguous(),
            middles=middles,
            dtype=self._like.dtype,
            order=order,
        )
