"""Cohere's Command-R (CohereForCausalLM) and Command-R7B (Cohere2ForCausalLM)."""

from __future__ import annotations

from typing import Any

import torch

from loraplex.engine.models.blocks import HeadNormSplit, HeadSplit, Layer, ParallelLayer
from loraplex.engine.models.decoder import Decoder
from loraplex.engine.models.layers import LayerNorm, Norm, PerHeadLayerNorm
from loraplex.engine.models.rope import (
    InterleavedRotaryPositions,
    Rope,
    no_positions,
    rope_cos_sin_cache,
)

Tensor = torch.Tensor


class CohereForCausalLM(Decoder):
    """Attention and a gated MLP beside each other behind one layer norm without bias, rotary
    positions on neighbouring dimensions, a factor on logits; some norm the heads of q and k."""

    def make_layer(self, index: int, prefix: str) -> Layer:
        return ParallelLayer(
            self.make_norm(f"{prefix}input_layernorm", self.config.hidden_size),
            self.make_attention(index, f"{prefix}self_attn."),
            self.gated_mlp(f"{prefix}mlp.", "hidden_act"),
        )

    def make_rope(self) -> Rope:
        return InterleavedRotaryPositions(rope_cos_sin_cache(self.config, self.max_model_len))

    def make_norm(self, name: str, size: int) -> Norm:
        return LayerNorm(name, size, self.config.layer_norm_eps, self.dtype, has_bias=False)

    def make_split(self, prefix: str) -> HeadSplit:
        if not getattr(self.config, "use_qk_norm", False):
            return super().make_split(prefix)
        heads, eps = self.heads, self.config.layer_norm_eps
        q_norm, k_norm = (
            PerHeadLayerNorm(f"{prefix}{name}_norm", section, heads.head_dim, eps, self.dtype)
            for name, section in zip("qk", heads.sections, strict=False)
        )
        return HeadNormSplit(heads, q_norm, k_norm)

    def logits(self, hidden: Tensor, batch: Any = None) -> Tensor:
        return super().logits(hidden, batch) * self.config.logit_scale


class Cohere2ForCausalLM(CohereForCausalLM):
    """Command-R with a sliding window in three of four layers, and no positions in the fourth."""

    def rope_of(self, index: int) -> Rope:
        return self.rope if self.window(index) is not None else no_positions
