"""StarCoder2."""

from __future__ import annotations

from loraplex.engine.models.blocks import FeedForward
from loraplex.engine.models.layers import LayerNorm, Norm
from loraplex.engine.models.llama import LlamaForCausalLM


class Starcoder2ForCausalLM(LlamaForCausalLM):
    """Llama with layer norms, biases, a plain MLP and a sliding window."""

    def make_norm(self, name: str, size: int) -> Norm:
        return LayerNorm(name, size, self.config.norm_epsilon, self.dtype)

    def make_mlp(self, index: int, prefix: str) -> FeedForward:
        return self.plain_mlp(prefix, "c_fc", "c_proj", "hidden_act", self.config.use_bias)

    @property
    def has_qkv_bias(self) -> bool:
        return self.config.use_bias
