"""Llama 2, 3, 3.1 and 3.2, and the architectures that differ from it by little."""

from __future__ import annotations

from loraplex.engine.models import ops
from loraplex.engine.models.blocks import (
    MLP,
    Attention,
    HeadNormSplit,
    HeadSplit,
    Layer,
    PreNormLayer,
)
from loraplex.engine.models.decoder import Decoder
from loraplex.engine.models.rope import Rope


class LlamaForCausalLM(Decoder):
    """RMS norms before attention and MLP, rotary positions, a gated MLP."""

    SUPPORTED = {"hidden_act": ("silu",)}

    def make_layer(self, index: int, prefix: str) -> Layer:
        hidden = self.config.hidden_size
        return PreNormLayer(
            self.make_norm(f"{prefix}input_layernorm", hidden),
            self.make_attention(index, f"{prefix}self_attn."),
            self.make_norm(f"{prefix}post_attention_layernorm", hidden),
            self.make_mlp(f"{prefix}mlp."),
        )

    def make_attention(self, index: int, prefix: str) -> Attention:
        hidden, q_size, kv_size = self.config.hidden_size, self.heads.q_size, self.heads.kv_size
        widths = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        return Attention(
            index,
            self.linear(prefix, hidden, widths, self.has_qkv_bias),
            self.make_split(prefix),
            self.rope_of(index),
            self.linear(prefix, q_size, {"o_proj": hidden}, self.has_o_bias),
            self.window(index),
        )

    def make_split(self, prefix: str) -> HeadSplit:
        return HeadSplit(self.heads)

    def make_mlp(self, prefix: str) -> MLP:
        hidden, size = self.config.hidden_size, self.config.intermediate_size
        has_bias = getattr(self.config, "mlp_bias", False)
        return MLP(
            self.linear(prefix, hidden, {"gate_proj": size, "up_proj": size}, has_bias),
            ops.silu_and_mul,
            self.linear(prefix, size, {"down_proj": hidden}, has_bias),
        )

    def rope_of(self, index: int) -> Rope:
        return self.rope

    @property
    def has_qkv_bias(self) -> bool:
        return getattr(self.config, "attention_bias", False)

    @property
    def has_o_bias(self) -> bool:
        return self.has_qkv_bias


class MistralForCausalLM(LlamaForCausalLM):
    """Some have a sliding window, which the config says."""


class Qwen2ForCausalLM(LlamaForCausalLM):
    """Biases on q, k and v."""

    has_qkv_bias = True
    has_o_bias = False


class Qwen3ForCausalLM(LlamaForCausalLM):
    """A norm on every head of q and k."""

    def make_split(self, prefix: str) -> HeadSplit:
        q_norm, k_norm = (
            self.make_norm(f"{prefix}{name}_norm", self.heads.head_dim) for name in "qk"
        )
        return HeadNormSplit(self.heads, q_norm, k_norm)
