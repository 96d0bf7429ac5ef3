"""OLMo 2."""

from __future__ import annotations

from loraplex.engine.models.blocks import HeadSplit, Layer, PostNormLayer, WholeNormSplit
from loraplex.engine.models.llama import LlamaForCausalLM


class Olmo2ForCausalLM(LlamaForCausalLM):
    """Llama with norms behind attention and MLP in place of those before, and on q and k."""

    def make_layer(self, index: int, prefix: str) -> Layer:
        hidden = self.config.hidden_size
        return PostNormLayer(
            self.make_attention(index, f"{prefix}self_attn."),
            self.make_norm(f"{prefix}post_attention_layernorm", hidden),
            self.make_mlp(index, f"{prefix}mlp."),
            self.make_norm(f"{prefix}post_feedforward_layernorm", hidden),
        )

    def make_split(self, prefix: str) -> HeadSplit:
        q_norm = self.make_norm(f"{prefix}q_norm", self.heads.q_size)
        k_norm = self.make_norm(f"{prefix}k_norm", self.heads.kv_size)
        return WholeNormSplit(self.heads, q_norm, k_norm)
