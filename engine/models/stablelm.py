"""StableLM 3B and StableLM 2."""

from __future__ import annotations

from loraplex.engine.models.blocks import (
    HeadNormSplit,
    HeadSplit,
    Layer,
    ParallelLayer,
    PreNormLayer,
)
from loraplex.engine.models.decoder import Decoder
from loraplex.engine.models.layers import LayerNorm, Norm, PerHeadLayerNorm
from loraplex.engine.models.weights import NamedPlaces


class StableLmForCausalLM(Decoder):
    """Layer norms, a gated MLP, rotary positions on a part of each head; some have biases on q, k
    and v, norms on their heads, or attention and MLP beside each other behind one norm."""

    has_out_bias = False
    TURNS_PARTS = True

    def make_layer(self, index: int, prefix: str) -> Layer:
        hidden = self.config.hidden_size
        norm = self.make_norm(f"{prefix}input_layernorm", hidden)
        attention = self.make_attention(index, f"{prefix}self_attn.")
        mlp = self.gated_mlp(f"{prefix}mlp.", "hidden_act")
        if self.config.use_parallel_residual:
            return ParallelLayer(norm, attention, mlp)
        mlp_norm = self.make_norm(f"{prefix}post_attention_layernorm", hidden)
        return PreNormLayer(norm, attention, mlp_norm, mlp)

    def make_norm(self, name: str, size: int) -> Norm:
        return LayerNorm(name, size, self.config.layer_norm_eps, self.dtype)

    def make_split(self, prefix: str) -> HeadSplit:
        if not self.config.qk_layernorm:
            return super().make_split(prefix)
        heads, eps = self.heads, self.config.layer_norm_eps
        q_norm, k_norm = (
            _ListedLayerNorm(f"{prefix}{name}_layernorm", section, heads.head_dim, eps, self.dtype)
            for name, section in zip("qk", heads.sections, strict=False)
        )
        return _ListedNormSplit(heads, q_norm, k_norm)

    @property
    def has_qkv_bias(self) -> bool:
        return self.config.use_qkv_bias


class _ListedNormSplit(HeadNormSplit):
    """Its weights are numbered by head, so that a share of the heads can't be told by shape."""


class _ListedLayerNorm(PerHeadLayerNorm):
    """The checkpoint has the weights of each head as a tensor."""

    def named_weights(self) -> NamedPlaces:
        for head, weight in enumerate(self.weight):
            yield f"{self.name}.norms.{head}.weight", weight
