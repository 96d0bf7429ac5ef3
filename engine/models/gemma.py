"""Gemma 1, 2 and 3, text only."""

from __future__ import annotations

from typing import Any

import torch

from loraplex.engine.models.blocks import (
    FeedForward,
    ForwardBatch,
    HeadSplit,
    Layer,
    SandwichNormLayer,
)
from loraplex.engine.models.layers import Norm, OffsetRMSNorm
from loraplex.engine.models.llama import LlamaForCausalLM
from loraplex.engine.models.rope import Rope, RotaryPositions, rope_cos_sin_cache

Tensor = torch.Tensor


class GemmaForCausalLM(LlamaForCausalLM):
    """Llama with norms by 1 + weight, GELU, and embeddings times the root of their size."""

    SUPPORTED = {"use_bidirectional_attention": (None, False)}

    def make_norm(self, name: str, size: int) -> Norm:
        return OffsetRMSNorm(name, size, self.config.rms_norm_eps, self.dtype)

    def embed(self, token_ids: Tensor, positions: Tensor, batch: ForwardBatch) -> Tensor:
        # The root is rounded as the model was trained with it.
        scale = torch.tensor(self.config.hidden_size**0.5, dtype=self.dtype, device="cpu").item()
        return self.look_up(token_ids, batch) * scale


class Gemma2ForCausalLM(GemmaForCausalLM):
    """Gemma with norms behind attention and MLP, too, soft caps on scores and logits, and a sliding
    window in every second layer."""

    def make_layer(self, index: int, prefix: str) -> Layer:
        hidden = self.config.hidden_size
        return SandwichNormLayer(
            self.make_norm(f"{prefix}input_layernorm", hidden),
            self.make_attention(index, f"{prefix}self_attn."),
            self.make_norm(f"{prefix}post_attention_layernorm", hidden),
            self.make_norm(f"{prefix}pre_feedforward_layernorm", hidden),
            self.make_mlp(index, f"{prefix}mlp."),
            self.make_norm(f"{prefix}post_feedforward_layernorm", hidden),
        )

    def make_mlp(self, index: int, prefix: str) -> FeedForward:
        return self.gated_mlp(prefix, "hidden_activation")

    @property
    def scale(self) -> float:
        return self.config.query_pre_attn_scalar**-0.5

    @property
    def logits_soft_cap(self) -> float:
        return self.config.attn_logit_softcapping or 0.0

    def logits(self, hidden: Tensor, batch: Any = None) -> Tensor:
        logits, cap = super().logits(hidden, batch), self.config.final_logit_softcapping
        if cap is None:
            return logits
        capped = (logits / cap).tanh() * cap
        # What adapters make impossible stays so.
        return capped if batch is None else capped.where(~logits.isneginf(), -torch.inf)


class Gemma3ForCausalLM(Gemma2ForCausalLM):
    """Gemma 2 with a norm on every head of q and k in place of the cap on scores, and other rotary
    positions in the layers that have a sliding window."""

    SUPPORTED = {**GemmaForCausalLM.SUPPORTED, "attn_logit_softcapping": (None,)}

    def make_rope(self) -> Rope:
        self.ropes = {
            layer_type: RotaryPositions(
                rope_cos_sin_cache(self.config, self.max_model_len, layer_type)
            )
            for layer_type in dict.fromkeys(self.config.layer_types)
        }
        return self.rope_of(0)

    def rope_of(self, index: int) -> Rope:
        return self.ropes[self.config.layer_types[index]]

    def make_split(self, prefix: str) -> HeadSplit:
        return self.head_norm_split(prefix)
