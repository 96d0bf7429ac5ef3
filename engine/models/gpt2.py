"""GPT-2."""

from __future__ import annotations

import torch

from loraplex.engine.models.blocks import (
    MLP,
    Attention,
    ForwardBatch,
    Layer,
    PreNormLayer,
    activation,
)
from loraplex.engine.models.decoder import Decoder
from loraplex.engine.models.layers import LayerNorm, Linear, Norm, Table
from loraplex.engine.models.rope import Rope, no_positions
from loraplex.engine.models.weights import DenseWeight, NamedPlaces

Tensor = torch.Tensor


class GPT2LMHeadModel(Decoder):
    """Learned positions, layer norms, biases, a plain MLP; linears are stored transposed."""

    LAYERS = "transformer.h"
    EMBEDDING = "transformer.wte"
    FINAL_NORM = "transformer.ln_f"
    IGNORED_SUFFIXES = (".attn.bias", ".attn.masked_bias")
    OTHER_PREFIXES = {"wpe.": "transformer.wpe."}
    QKV = ("c_attn",)
    OUT = "c_proj"
    SUPPORTED = {
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    }
    has_qkv_bias = True

    def make_layer(self, index: int, prefix: str) -> Layer:
        hidden = self.config.hidden_size
        return PreNormLayer(
            self.make_norm(f"{prefix}ln_1", hidden),
            self.make_attention(index, f"{prefix}attn."),
            self.make_norm(f"{prefix}ln_2", hidden),
            self.make_mlp(f"{prefix}mlp."),
        )

    def make_attention(self, index: int, prefix: str) -> Attention:
        attention = super().make_attention(index, prefix)
        _store_transposed(attention.qkv_proj)
        _store_transposed(attention.out_proj)
        return attention

    def make_mlp(self, prefix: str) -> MLP:
        hidden = self.config.hidden_size
        size = self.config.n_inner or 4 * hidden
        mlp = MLP(
            self.linear(prefix, hidden, {"c_fc": size}, has_bias=True),
            activation(self.config, "activation_function"),
            self.linear(prefix, size, {"c_proj": hidden}, has_bias=True),
        )
        _store_transposed(mlp.up_proj)
        _store_transposed(mlp.down_proj)
        return mlp

    def make_rope(self) -> Rope:
        shape = self.config.max_position_embeddings, self.config.hidden_size
        self.positions = Table("transformer.wpe", *shape, self.dtype)
        return no_positions

    def make_norm(self, name: str, size: int) -> Norm:
        return LayerNorm(name, size, self.config.layer_norm_epsilon, self.dtype)

    def embed(self, token_ids: Tensor, positions: Tensor, batch: ForwardBatch) -> Tensor:
        return self.look_up(token_ids, batch) + self.positions(positions)


class _TransposedWeight(DenseWeight):
    """The checkpoint has it as [in_features, out_features]."""

    def places(self) -> NamedPlaces:
        for name, place in super().places():
            assert isinstance(place, torch.Tensor)
            yield name, place.T


def _store_transposed(linear: Linear) -> None:
    linear.weight = _TransposedWeight(linear.in_features, linear.out_features, linear.like)
