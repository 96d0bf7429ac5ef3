"""OLMo 2."""

from __future__ import annotations

from loraplex.engine.models.blocks import HeadSplit, Layer, PostNormLayer, WholeNormSplit
from loraplex.engine.models.layers import RMSNorm
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
        heads, eps = self.heads, self.config.rms_norm_eps
        q_norm = RMSNorm(f"{prefix}q_norm", heads.q_size, eps, self.dtype)
        k_norm = RMSNorm(f"{prefix}k_norm", heads.kv_size, eps, self.dtype)
        for norm, section in zip((q_norm, k_norm), heads.sections, strict=False):
            norm.sections = (section,)
        return WholeNormSplit(heads, q_norm, k_norm)
