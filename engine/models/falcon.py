"""Falcon: 7B and 40B, and the older ones without ALiBi."""

from __future__ import annotations

from loraplex.engine.models.blocks import (
    MLP,
    GroupedSplit,
    HeadSplit,
    Layer,
    ParallelLayer,
    ParallelNormsLayer,
    PreNormLayer,
    activation,
)
from loraplex.engine.models.decoder import Decoder
from loraplex.engine.models.layers import LayerNorm, Norm


class FalconForCausalLM(Decoder):
    """q, k and v in one tensor, of all heads in turn (7B: one KV head) or by KV head (40B); mostly
    attention and MLP beside each other, behind one layer norm (7B) or two (40B)."""

    LAYERS = "transformer.h"
    EMBEDDING = "transformer.word_embeddings"
    FINAL_NORM = "transformer.ln_f"
    QKV = ("query_key_value",)
    OUT = "dense"
    SUPPORTED = {"alibi": (False, None)}

    def make_layer(self, index: int, prefix: str) -> Layer:
        config = self.config
        attention = self.make_attention(index, f"{prefix}self_attention.")
        mlp = self.make_mlp(f"{prefix}mlp.")
        if config.new_decoder_architecture and config.num_ln_in_parallel_attn != 1:
            attention_norm, mlp_norm = (
                self.make_norm(f"{prefix}ln_{name}", config.hidden_size) for name in ("attn", "mlp")
            )
            return ParallelNormsLayer(attention_norm, attention, mlp_norm, mlp)
        norm = self.make_norm(f"{prefix}input_layernorm", config.hidden_size)
        if config.new_decoder_architecture or config.parallel_attn:
            return ParallelLayer(norm, attention, mlp)
        mlp_norm = self.make_norm(f"{prefix}post_attention_layernorm", config.hidden_size)
        return PreNormLayer(norm, attention, mlp_norm, mlp)

    def make_mlp(self, prefix: str) -> MLP:
        config = self.config
        hidden, size = config.hidden_size, config.ffn_hidden_size
        return MLP(
            self.linear(prefix, hidden, {"dense_h_to_4h": size}, config.bias),
            activation(config, "activation"),
            self.linear(prefix, size, {"dense_4h_to_h": hidden}, config.bias),
        )

    def make_split(self, prefix: str) -> HeadSplit:
        return GroupedSplit(self.heads)

    def make_norm(self, name: str, size: int) -> Norm:
        return LayerNorm(name, size, self.config.layer_norm_epsilon, self.dtype)

    @property
    def has_qkv_bias(self) -> bool:
        return self.config.bias
