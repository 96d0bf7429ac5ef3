"""Phi-2 (PhiForCausalLM), and Phi-3, 3.5 and 4 (Phi3ForCausalLM)."""

from __future__ import annotations

from loraplex.engine.models.blocks import HeadSplit, Layer, ParallelLayer
from loraplex.engine.models.decoder import Decoder
from loraplex.engine.models.layers import LayerNorm, Linear, Norm
from loraplex.engine.models.llama import LlamaForCausalLM


class PhiForCausalLM(Decoder):
    """Attention and MLP beside each other behind one layer norm, biases everywhere, a plain MLP,
    rotary positions on a part of each head."""

    FINAL_NORM = "model.final_layernorm"
    OUT = "dense"
    has_qkv_bias = True
    TURNS_PARTS = True

    def make_layer(self, index: int, prefix: str) -> Layer:
        return ParallelLayer(
            self.make_norm(f"{prefix}input_layernorm", self.config.hidden_size),
            self.make_attention(index, f"{prefix}self_attn."),
            self.plain_mlp(f"{prefix}mlp.", "fc1", "fc2", "hidden_act", has_bias=True),
        )

    def make_norm(self, name: str, size: int) -> Norm:
        return LayerNorm(name, size, self.config.layer_norm_eps, self.dtype)

    def make_split(self, prefix: str) -> HeadSplit:
        if not self.config.qk_layernorm:
            return super().make_split(prefix)
        return self.head_norm_split(prefix, "layernorm")

    def make_head(self) -> Linear:
        widths = {self.HEAD: self.config.vocab_size}
        return self.linear("", self.config.hidden_size, widths, has_bias=True)


class Phi3ForCausalLM(LlamaForCausalLM):
    """Llama with q, k and v in one tensor, gate and up in one; long rope factors, and rotary
    positions on a part of each head, if the config says so."""

    QKV = ("qkv_proj",)
    GATE_UP = ("gate_up_proj",)
    TURNS_PARTS = True
