"""Chooses the method of a model's quantised weights, and puts it in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from loraplex.engine.models.layers import Linear
from loraplex.engine.models.quantization.awq import Awq
from loraplex.engine.models.quantization.bitsandbytes import BitsAndBytes, BitsAndBytesOnLoad
from loraplex.engine.models.quantization.compressed_tensors import CompressedTensors
from loraplex.engine.models.quantization.fp8 import FbgemmFp8, Fp8, Fp8OnLoad
from loraplex.engine.models.quantization.gguf import Gguf
from loraplex.engine.models.quantization.gptq import Gptq
from loraplex.engine.models.quantization.settings import unsupported
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


def find_method(requested: str | None, hf_config: Any, num_shards: int = 1) -> Method | None:
    """The method that the checkpoint, or the option `quantization`, asks for.

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
    return CHECKPOINT_METHODS[name](config)


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
        parts: dict[str, Part] = {}
        is_quantised = False
        for name, out_features in linear.out_features.items():
            sizes = out_features, linear.in_features, linear.like
            part = method.part(linear.prefix + name, *sizes)
            is_quantised |= part is not None
            parts[name] = part or DensePart(*sizes)
        if is_quantised:
            if type(linear.weight) is not DenseWeight:
                raise ValueError(
                    f"{linear.prefix}{name} of this model is stored transposed, which is not "
                    "supported together with quantisation"
                )
            linear.weight = QuantisedWeight(parts)
