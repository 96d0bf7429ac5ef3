"""Chooses the method of a model's quantised weights, and puts it in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from loraplex.engine.models.experts_weight import SeparateExperts
from loraplex.engine.models.layers import ExpertLinears, Linear, Router
from loraplex.engine.models.quantization.awq import Awq
from loraplex.engine.models.quantization.bitsandbytes import BitsAndBytes, BitsAndBytesOnLoad
from loraplex.engine.models.quantization.compressed_tensors import CompressedTensors
from loraplex.engine.models.quantization.eight_bits import EightBitPart
from loraplex.engine.models.quantization.fp8 import FbgemmFp8, Fp8, Fp8OnLoad
from loraplex.engine.models.quantization.gguf import Gguf
from loraplex.engine.models.quantization.gptq import Gptq
from loraplex.engine.models.quantization.settings import (
    check_divisible,
    unsupported,
    with_current_names,
)
from loraplex.engine.models.quantization.weight import DensePart, Method, Part, QuantisedWeight
from loraplex.engine.models.weights import DenseWeight

# By quant_method of the checkpoint's quantization_config, which they are made from.
CHECKPOINT_METHODS: dict[str, Callable[[dict[str, Any]], Method]] = {
    "awq": Awq,
    "gptq": Gptq,
    "bitsandbytes": BitsAndBytes,
    "fp8": Fp8,
    "fbgemm_fp8": FbgemmFp8,
    "compressed-tensors": CompressedTensors,
    "gguf": Gguf,
}
# By what the option `quantization` says of a plain checkpoint.
ON_LOAD_METHODS: dict[str, Callable[[], Method]] = {
    "bitsandbytes": lambda: BitsAndBytesOnLoad("nf4"),
    "bitsandbytes-fp4": lambda: BitsAndBytesOnLoad("fp4"),
    "bitsandbytes-int8": lambda: BitsAndBytesOnLoad("int8"),
    "fp8": Fp8OnLoad,
}


def find_method(
    requested: str | None,
    hf_config: Any,
    num_shards: int = 1,
    other_prefixes: Mapping[str, str] = MappingProxyType({}),
) -> Method | None:
    """The method that the checkpoint, or the option `quantization`, asks for.

    other_prefixes: what modules' names begin with in older checkpoints, and in the model.

    Raises ValueError for a method or setting that is not supported, or can't be divided into so
    many shares, and if both disagree.
    """
    config = getattr(hf_config, "quantization_config", None)
    if config is None:
        return None if requested is None else _on_load(requested)
    name = config.get("quant_method")
    if requested not in (None, name):
        raise ValueError(
            f"quantization={requested!r} is not allowed: the checkpoint is quantised by {name!r}"
        )
    if name not in CHECKPOINT_METHODS:
        raise unsupported("quant_method", name, "one of " + _list(CHECKPOINT_METHODS))
    if num_shards > 1 and config.get("load_in_4bit"):
        raise ValueError(
            f"tensor_parallel_size={num_shards} is not supported for checkpoints that bitsandbytes "
            "wrote in 4 bits: have it quantise a plain one on load"
        )
    method = CHECKPOINT_METHODS[name](with_current_names(config, other_prefixes))
    return method if num_shards == 1 else _InShares(method)


class _InShares:
    """A method of a checkpoint of which each process has a share, made of whole blocks."""

    def __init__(self, method: Method) -> None:
        self._method = method

    def part(
        self, module: str, out_features: int, in_features: int, like: torch.Tensor
    ) -> Part | None:
        part = self._method.part(module, out_features, in_features, like)
        if isinstance(part, EightBitPart) and part.block is not None:
            check_divisible(module, "outputs in each process", out_features, part.block[0])
        return part


def _on_load(requested: str) -> Method:
    if requested not in ON_LOAD_METHODS:
        raise ValueError(
            f"quantization={requested!r} is not allowed: the checkpoint's config.json has no "
            "quantization_config; a plain checkpoint can be quantised on load by "
            + _list(ON_LOAD_METHODS)
        )
    return ON_LOAD_METHODS[requested]()


def _list(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def quantise(linears: Iterable[Linear], method: Method) -> None:
    """Give linears, before they are loaded, the weights that the method has for them.

    Raises ValueError for sizes that the method does not allow.
    """
    for linear in linears:
        if isinstance(linear, Router):
            continue
        weight = _weight(
            linear.prefix, linear.in_features, linear.out_features, linear.like, method
        )
        if weight is not None:
            if type(linear.weight) is not DenseWeight:
                raise ValueError(
                    f"{linear.prefix}{next(iter(linear.out_features))} of this model is stored "
                    "transposed, which is not supported together with quantisation"
                )
            linear.weight = weight


def quantise_experts(experts: Iterable[ExpertLinears], method: Method) -> None:
    """The same for linears of experts. On GPUs those of plain checkpoints stay as they are.

    Raises ValueError for those of others on GPUs, too.
    """
    for linears in experts:
        like = linears.like
        if like.is_cuda and isinstance(method, BitsAndBytesOnLoad | Fp8OnLoad):
            continue
        if like.is_cuda:
            raise ValueError(
                "quantization_config of this model is not supported on GPUs: it has experts"
            )
        sizes = linears.in_features, linears.parts_of_output
        weights = [
            _weight(f"{linears.prefix}{expert}.", *sizes, like, method)
            for expert in range(linears.num_experts)
        ]
        if any(weights):
            linears.weight = SeparateExperts(
                [weight or DenseWeight(*sizes, like) for weight in weights],
                sum(linears.parts_of_output.values()),
                like,
            )


def _weight(
    prefix: str,
    in_features: int,
    out_features: dict[str, int],
    like: torch.Tensor,
    method: Method,
) -> QuantisedWeight | None:
    """None: no part of it is quantised."""
    parts: dict[str, Part] = {}
    is_quantised = False
    for name, rows in out_features.items():
        part = method.part(prefix + name, rows, in_features, like)
        is_quantised |= part is not None
        parts[name] = part or DensePart(rows, in_features, like)
    return QuantisedWeight(parts) if is_quantised else None
