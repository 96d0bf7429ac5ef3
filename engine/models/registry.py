"""Finds the class of an architecture, builds models, and says what adapters can attach to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from loraplex.engine.config import EngineConfig
from loraplex.engine.models.config import (
    head_dim,
    read_model_config,
    resolve_dtype,
    resolve_kv_dtype,
)
from loraplex.engine.models.layers import Linear
from loraplex.engine.models.llama import LlamaForCausalLM
from loraplex.engine.models.loader import fill_dummy_weights, load_weights
from loraplex.engine.models.locate import locate_model
from loraplex.engine.models.quantization.methods import find_method, quantise
from loraplex.lora.spec import BaseModelSpec, LoRAModule

Model = LlamaForCausalLM
ARCHITECTURES: dict[str, type[Model]] = {"LlamaForCausalLM": LlamaForCausalLM}


def model_class(hf_config: Any) -> type[Model]:
    """Raises ValueError for an architecture that is not supported."""
    names = hf_config.architectures or []
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    raise ValueError(
        f"architectures={names!r} of this model is not supported: it must be one of "
        + ", ".join(ARCHITECTURES)
    )


def build_model(
    config: EngineConfig,
    path: Path,
    hf_config: Any,
    dtype: torch.dtype,
    max_model_len: int,
    device: torch.device,
) -> Model:
    """The model with its weights, on a device."""
    method = find_method(config.quantization, hf_config)
    with device:
        model = model_class(hf_config)(hf_config, dtype, max_model_len)
    if method is not None:
        quantise(_linears(model), method)
    if config.load_format == "dummy":
        fill_dummy_weights(model, config.seed, device)
    else:
        load_weights(model, path)
    return model


def _linears(model: Model) -> Iterator[Linear]:
    yield model.lm_head
    for layer in model.layers:
        for _, linear in layer.linears():
            yield linear


def kv_block_shape(hf_config: Any, block_size: int) -> tuple[int, int, int, int, int]:
    """Shape of a page as KV: [num_layers, 2, block_size, num_kv_heads, head_dim]."""
    heads, layers = hf_config.num_key_value_heads, hf_config.num_hidden_layers
    return layers, 2, block_size, heads, head_dim(hf_config)


def page_bytes(hf_config: Any, block_size: int, kv_dtype: torch.dtype) -> int:
    """Bytes of a page: one KV block of all layers."""
    return torch.Size(kv_block_shape(hf_config, block_size)).numel() * kv_dtype.itemsize


def base_model_spec(hf_config: Any) -> BaseModelSpec:
    """What adapters of this model may target."""
    with torch.device("meta"):
        layer = model_class(hf_config)(hf_config, torch.float32, 1).layers[0]
    modules = [
        LoRAModule(name, f"{linear.prefix}{name}".removeprefix(layer.prefix), linear.in_features, n)
        for _, linear in layer.linears()
        for name, n in linear.out_features.items()
    ]
    return BaseModelSpec(
        architecture=hf_config.architectures[0],
        num_layers=hf_config.num_hidden_layers,
        modules=tuple(modules),
    )


def lora_spec(
    model: str,
    revision: str | None = None,
    dtype: str = "auto",
    block_size: int = 16,
    kv_cache_dtype: str = "auto",
) -> tuple[BaseModelSpec, int]:
    """(what adapters of the model may target, bytes of a page), without loading its weights."""
    hf_config = read_model_config(locate_model(model, revision))
    kv_dtype = resolve_kv_dtype(kv_cache_dtype, resolve_dtype(dtype, hf_config))
    return base_model_spec(hf_config), page_bytes(hf_config, block_size, kv_dtype)
