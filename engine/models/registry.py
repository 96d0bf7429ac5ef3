"""Finds the class of an architecture, builds models, and says what adapters can attach to."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from loraplex.engine.config import EngineConfig
from loraplex.engine.models.cohere import Cohere2ForCausalLM, CohereForCausalLM
from loraplex.engine.models.config import read_model_config, resolve_dtype, resolve_kv_dtype
from loraplex.engine.models.decoder import Decoder
from loraplex.engine.models.falcon import FalconForCausalLM
from loraplex.engine.models.fallback import TransformersDecoder, load_fallback, outline_fallback
from loraplex.engine.models.gemma import Gemma2ForCausalLM, Gemma3ForCausalLM, GemmaForCausalLM
from loraplex.engine.models.gpt2 import GPT2LMHeadModel
from loraplex.engine.models.gpt_neox import GPTNeoXForCausalLM
from loraplex.engine.models.granite import GraniteForCausalLM
from loraplex.engine.models.layers import ExpertLinears, Linear
from loraplex.engine.models.llama import (
    LlamaForCausalLM,
    Ministral3ForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    SmolLM3ForCausalLM,
)
from loraplex.engine.models.loader import fill_dummy_weights, load_weights
from loraplex.engine.models.locate import locate_model
from loraplex.engine.models.moe import MixtralForCausalLM, Qwen3MoeForCausalLM
from loraplex.engine.models.multimodal import (
    Gemma3ForConditionalGeneration,
    Mistral3ForConditionalGeneration,
)
from loraplex.engine.models.olmo2 import Olmo2ForCausalLM
from loraplex.engine.models.phi import Phi3ForCausalLM, PhiForCausalLM
from loraplex.engine.models.quantization.methods import find_method, quantise, quantise_experts
from loraplex.engine.models.reused_memory import ReusedMemory
from loraplex.engine.models.shards import WHOLE, Shard, drop_summed_biases
from loraplex.engine.models.stablelm import StableLmForCausalLM
from loraplex.engine.models.starcoder2 import Starcoder2ForCausalLM
from loraplex.engine.models.weights import DenseWeight
from loraplex.lora.spec import ONE_SECTION, BaseModelSpec, LoRAModule

Model = Decoder | TransformersDecoder


class HasLinears(Protocol):
    """A layer of any Model."""

    def linears(self) -> Iterator[tuple[object, str, Linear]]:
        """Owner, attribute name and value of every linear."""

    def expert_linears(self) -> Iterator[tuple[object, str, ExpertLinears]]:
        """The same of those of experts."""


def model_layers(model: Model) -> Sequence[HasLinears]:
    return model.layers


ARCHITECTURES: dict[str, type[Decoder]] = {
    architecture.__name__: architecture
    for architecture in (
        LlamaForCausalLM,
        MistralForCausalLM,
        Ministral3ForCausalLM,
        Qwen2ForCausalLM,
        Qwen3ForCausalLM,
        SmolLM3ForCausalLM,
        GemmaForCausalLM,
        Gemma2ForCausalLM,
        Gemma3ForCausalLM,
        PhiForCausalLM,
        Phi3ForCausalLM,
        Starcoder2ForCausalLM,
        GPT2LMHeadModel,
        GPTNeoXForCausalLM,
        FalconForCausalLM,
        Olmo2ForCausalLM,
        GraniteForCausalLM,
        CohereForCausalLM,
        Cohere2ForCausalLM,
        StableLmForCausalLM,
        MixtralForCausalLM,
        Qwen3MoeForCausalLM,
        Gemma3ForConditionalGeneration,
        Mistral3ForConditionalGeneration,
    )
}


def model_class(hf_config: Any) -> type[Decoder] | None:
    """None for an architecture that transformers' implementation is to serve."""
    for name in hf_config.architectures or []:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    return None


def build_model(
    config: EngineConfig,
    path: Path,
    hf_config: Any,
    dtype: torch.dtype,
    max_model_len: int,
    device: torch.device,
    shard: Shard = WHOLE,
) -> Model:
    """The model with its weights, on a device; or the share of it that hf_config is of."""
    architecture = model_class(hf_config)
    if architecture is None:
        return load_fallback(path, hf_config, dtype, device, config.load_format == "dummy")
    names = architecture.OTHER_PREFIXES
    method = find_method(config.quantization, hf_config, shard.count, names)
    with device:
        model = architecture(hf_config, dtype, max_model_len)
    if method is not None:
        quantise((linear for _, _, linear in model.linears()), method)
        quantise_experts((experts for _, _, experts in model.expert_linears()), method)
    if device.type == "cpu":
        memory = ReusedMemory()
        for _, _, linear in model.linears():
            if isinstance(linear.weight, DenseWeight):
                linear.weight.load_into(memory)
    if config.load_format == "dummy":
        fill_dummy_weights(model, config.seed, device)
    else:
        load_weights(model, path, shard)
    if shard.index > 0:
        drop_summed_biases(model)
    return model


def kv_block_shape(hf_config: Any, block_size: int) -> tuple[int, int, int, int, int]:
    """Shape of a page as KV: [num_layers, 2, block_size, num_kv_heads, head_dim]."""
    model = outline_model(hf_config)
    return len(model.layers), 2, block_size, model.heads.num_kv_heads, model.heads.head_dim


def page_bytes(hf_config: Any, block_size: int, kv_dtype: torch.dtype) -> int:
    """Bytes of a page: one KV block of all layers."""
    return torch.Size(kv_block_shape(hf_config, block_size)).numel() * kv_dtype.itemsize


def base_model_spec(hf_config: Any) -> BaseModelSpec:
    """What adapters of this model may target."""
    model = outline_model(hf_config)
    layers = [
        _modules(layer, f"{model.LAYERS}.{i}.") for i, layer in enumerate(model_layers(model))
    ]
    embedding = head = None
    if isinstance(model, Decoder):
        vocab_size, hidden_size = model.embedding.shape
        embedding = LoRAModule(model.EMBEDDING, model.EMBEDDING, vocab_size, hidden_size)
        head = LoRAModule(model.HEAD, model.HEAD, hidden_size, vocab_size)
    return BaseModelSpec(
        architecture=hf_config.architectures[0],
        num_layers=len(model.layers),
        modules=tuple(_merge_layers(layers)),
        layer_path=model.LAYERS,
        embedding=embedding,
        head=head,
        is_tied=isinstance(model, Decoder) and model.is_tied,
        renamed_parts=model.OTHER_PARTS,
    )


def _modules(layer: HasLinears, prefix: str) -> list[LoRAModule]:
    linears: list[tuple[Linear | ExpertLinears, int]] = [
        *((linear, 1) for _, _, linear in layer.linears()),
        *((experts, experts.num_experts) for _, _, experts in layer.expert_linears()),
    ]
    return [
        LoRAModule(
            name,
            path,
            linear.in_features,
            linear.out_features[name],
            num_experts,
            sections=linear.sections.get(name, ONE_SECTION),
        )
        for linear, num_experts in linears
        for name, path in linear.paths(prefix).items()
    ]


def _merge_layers(layers: Sequence[Sequence[LoRAModule]]) -> Iterator[LoRAModule]:
    """Each module of any layer once; none of those that are of several shapes."""
    for module in dict.fromkeys(itertools.chain(*layers)):
        same_path = [i for i, layer in enumerate(layers) for m in layer if m.path == module.path]
        same = frozenset(i for i, layer in enumerate(layers) if module in layer)
        if len(same) == len(layers):
            yield module
        elif len(same) == len(same_path):
            yield replace(module, layers=same)


def outline_model(hf_config: Any) -> Model:
    """The model without memory for its weights."""
    architecture = model_class(hf_config)
    if architecture is None:
        return outline_fallback(hf_config)
    with torch.device("meta"):
        return architecture(hf_config, torch.float32, 1)


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
