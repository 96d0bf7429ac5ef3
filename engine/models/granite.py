"""Granite 3."""

from __future__ import annotations

from typing import Any

import torch

from loraplex.engine.models.blocks import Attention, FeedForward, ForwardBatch, Layer, PreNormLayer
from loraplex.engine.models.layers import Norm
from loraplex.engine.models.llama import LlamaForCausalLM

Tensor = torch.Tensor


class GraniteForCausalLM(LlamaForCausalLM):
    """Llama with factors on embeddings, attention scores, what blocks add, and logits."""

    def make_layer(self, index: int, prefix: str) -> Layer:
        hidden = self.config.hidden_size
        return _GraniteLayer(
            self.config.residual_multiplier,
            self.make_norm(f"{prefix}input_layernorm", hidden),
            self.make_attention(index, f"{prefix}self_attn."),
            self.make_norm(f"{prefix}post_attention_layernorm", hidden),
            self.make_mlp(index, f"{prefix}mlp."),
        )

    @property
    def scale(self) -> float:
        return self.config.attention_multiplier

    def embed(self, token_ids: Tensor, positions: Tensor, batch: ForwardBatch) -> Tensor:
        return self.look_up(token_ids, batch) * self.config.embedding_multiplier

    def logits(self, hidden: Tensor, batch: Any = None) -> Tensor:
        return super().logits(hidden, batch) / self.config.logits_scaling


class _GraniteLayer(PreNormLayer):
    def __init__(
        self,
        multiplier: float,
        attention_norm: Norm,
        attention: Attention,
        mlp_norm: Norm,
        mlp: FeedForward,
    ) -> None:
        super().__init__(attention_norm, attention, mlp_norm, mlp)
        self.multiplier = multiplier

    def __call__(
        self, x: Tensor, residual: Tensor, positions: Tensor, batch: ForwardBatch
    ) -> Tensor:
        x = self.attention(self.attention_norm.add(x, residual), positions, batch)
        x = self.mlp_norm.add(x * self.multiplier, residual)
        return self.mlp(x, batch) * self.multiplier
