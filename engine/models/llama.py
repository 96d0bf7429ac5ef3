"""Llama 2, 3, 3.1 and 3.2, and architectures that differ from it by little."""

from __future__ import annotations

import torch

from loraplex.engine.models.blocks import FeedForward, HeadSplit, Layer, PreNormLayer
from loraplex.engine.models.decoder import Decoder
from loraplex.engine.models.rope import (
    Rope,
    ScaledRotaryPositions,
    no_positions,
    rope_cos_sin_cache,
)


class LlamaForCausalLM(Decoder):
    """RMS norms before attention and MLP, rotary positions, a gated MLP."""

    def make_layer(self, index: int, prefix: str) -> Layer:
        hidden = self.config.hidden_size
        return PreNormLayer(
            self.make_norm(f"{prefix}input_layernorm", hidden),
            self.make_attention(index, f"{prefix}self_attn."),
            self.make_norm(f"{prefix}post_attention_layernorm", hidden),
            self.make_mlp(index, f"{prefix}mlp."),
        )

    def make_mlp(self, index: int, prefix: str) -> FeedForward:
        has_bias = getattr(self.config, "mlp_bias", False)
        return self.gated_mlp(prefix, "hidden_act", has_bias)


class MistralForCausalLM(LlamaForCausalLM):
    """Llama; some have a sliding window."""


class Ministral3ForCausalLM(MistralForCausalLM):
    """Mistral whose attention scores grow with the position, if the config says so."""

    def make_rope(self) -> Rope:
        parameters = self.config.rope_parameters
        beta = parameters.get("llama_4_scaling_beta")
        if beta is None:
            return super().make_rope()
        table = rope_cos_sin_cache(self.config, self.max_model_len)
        spans = torch.arange(len(table)) // parameters["original_max_position_embeddings"]
        scales = 1 + beta * (1 + spans).log()
        return ScaledRotaryPositions(table, scales.to(self.dtype))


class Qwen2ForCausalLM(LlamaForCausalLM):
    """Llama with biases on q, k and v; a sliding window on the last layers, if any."""

    has_qkv_bias = True
    has_out_bias = False


class Qwen3ForCausalLM(LlamaForCausalLM):
    """Llama with a norm on every head of q and k."""

    def make_split(self, prefix: str) -> HeadSplit:
        return self.head_norm_split(prefix)


class SmolLM3ForCausalLM(LlamaForCausalLM):
    """Llama with every fourth layer without positions."""

    def rope_of(self, index: int) -> Rope:
        return self.rope if self.config.no_rope_layers[index] else no_positions
