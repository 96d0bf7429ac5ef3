"""GPT-NeoX and Pythia."""

from __future__ import annotations

from loraplex.engine.models.blocks import (
    GroupedSplit,
    HeadSplit,
    Layer,
    ParallelNormsLayer,
    PreNormLayer,
)
from loraplex.engine.models.decoder import Decoder
from loraplex.engine.models.layers import LayerNorm, Norm


class GPTNeoXForCausalLM(Decoder):
    """Attention and MLP beside each other, each behind a layer norm; q, k and v in one tensor, by
    head; biases, a plain MLP, rotary positions on a part of each head."""

    LAYERS = "gpt_neox.layers"
    EMBEDDING = "gpt_neox.embed_in"
    FINAL_NORM = "gpt_neox.final_layer_norm"
    IGNORED_SUFFIXES = (
        ".attention.bias", ".attention.masked_bias", ".attention.rotary_emb.inv_freq",
    )  # fmt: skip
    OTHER_PREFIXES = {"embed_out.": "lm_head."}
    QKV = ("query_key_value",)
    OUT = "dense"
    TURNS_PARTS = True

    def make_layer(self, index: int, prefix: str) -> Layer:
        hidden = self.config.hidden_size
        kind = ParallelNormsLayer if self.config.use_parallel_residual else PreNormLayer
        return kind(
            self.make_norm(f"{prefix}input_layernorm", hidden),
            self.make_attention(index, f"{prefix}attention."),
            self.make_norm(f"{prefix}post_attention_layernorm", hidden),
            self.plain_mlp(
                f"{prefix}mlp.", "dense_h_to_4h", "dense_4h_to_h", "hidden_act", has_bias=True
            ),
        )

    def make_split(self, prefix: str) -> HeadSplit:
        return GroupedSplit(self.heads)

    def make_norm(self, name: str, size: int) -> Norm:
        return LayerNorm(name, size, self.config.layer_norm_eps, self.dtype)
