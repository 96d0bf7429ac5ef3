"""The Llama architecture. Knows neither LoRA nor the attention backend."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from loraplex.engine.models import ops
from loraplex.engine.models.config import head_dim
from loraplex.engine.models.layers import ForwardBatch, Linear, rope_cos_sin_cache
from loraplex.engine.models.weights import NamedPlaces


class LlamaLayer:
    """One transformer block."""

    def __init__(self, config: Any, index: int, dtype: torch.dtype) -> None:
        self.index = index
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = head_dim(config)
        self.eps = config.rms_norm_eps
        self.prefix = f"model.layers.{index}."
        hidden, intermediate = config.hidden_size, config.intermediate_size
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim

        def linear(
            module: str, in_features: int, out_features: dict[str, int], has_bias: bool
        ) -> Linear:
            return Linear(f"{self.prefix}{module}.", in_features, out_features, dtype, has_bias)

        self.qkv_proj = linear(
            "self_attn",
            hidden,
            {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size},
            config.attention_bias,
        )
        self.o_proj = linear("self_attn", q_size, {"o_proj": hidden}, config.attention_bias)
        self.gate_up_proj = linear(
            "mlp", hidden, {"gate_proj": intermediate, "up_proj": intermediate}, config.mlp_bias
        )
        self.down_proj = linear("mlp", intermediate, {"down_proj": hidden}, config.mlp_bias)
        self.input_norm = torch.empty(hidden, dtype=dtype)
        self.post_attention_norm = torch.empty(hidden, dtype=dtype)

    def linears(self) -> Iterator[tuple[str, Linear]]:
        """Attribute name and value of every linear, in the order of computation."""
        for name in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"):
            yield name, getattr(self, name)

    def named_weights(self) -> NamedPlaces:
        for _, linear in self.linears():
            yield from linear.named_weights()
        yield f"{self.prefix}input_layernorm.weight", self.input_norm
        yield f"{self.prefix}post_attention_layernorm.weight", self.post_attention_norm

    def __call__(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        positions: torch.Tensor,
        cos_sin_cache: torch.Tensor,
        batch: ForwardBatch,
    ) -> torch.Tensor:
        """x: output of the block before, not yet added to residual; [num_tokens, hidden] both."""
        num_tokens = x.shape[0]
        ops.fused_add_rms_norm(x, residual, self.input_norm, self.eps)
        qkv = self.qkv_proj(x, batch).view(num_tokens, -1, self.head_dim)
        q, k, v = qkv.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        ops.apply_rope(positions, q, k, cos_sin_cache)
        x = self.o_proj(batch.attend(self.index, q, k, v), batch)
        ops.fused_add_rms_norm(x, residual, self.post_attention_norm, self.eps)
        gate_up = self.gate_up_proj(x, batch)
        return self.down_proj(ops.silu_and_mul(gate_up), batch)


class LlamaForCausalLM:
    """Embedding, blocks, final norm and head."""

    # Checkpoint tensors that carry nothing: tables computed anew, and a tied head's copy.
    IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)

    def __init__(self, config: Any, dtype: torch.dtype, max_model_len: int) -> None:
        if config.hidden_act != "silu":
            raise ValueError(
                f"hidden_act={config.hidden_act!r} is not supported: it must be 'silu'"
            )
        self.eps = config.rms_norm_eps
        self.embedding = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype)
        self.layers = [LlamaLayer(config, i, dtype) for i in range(config.num_hidden_layers)]
        self.norm = torch.empty(config.hidden_size, dtype=dtype)
        self.lm_head = Linear("", config.hidden_size, {"lm_head": config.vocab_size}, dtype)
        self.is_tied = config.tie_word_embeddings
        self.cos_sin_cache = rope_cos_sin_cache(config, max_model_len)

    def named_weights(self) -> NamedPlaces:
        """Name of every checkpoint tensor, and where it goes. Called once, before loading."""
        yield "model.embed_tokens.weight", self.embedding
        for layer in self.layers:
            yield from layer.named_weights()
        yield "model.norm.weight", self.norm
        if not self.is_tied:
            yield from self.lm_head.named_weights()

    def is_ignored(self, name: str) -> bool:
        """Whether a checkpoint tensor without a place is left out knowingly."""
        return name.endswith(self.IGNORED_SUFFIXES) or (self.is_tied and name == "lm_head.weight")

    def finish_loading(self) -> None:
        """Called once, when all weights are in."""
        if self.is_tied:
            self.lm_head.tie(self.embedding)
        self.lm_head.pack()
        for layer in self.layers:
            for _, linear in layer.linears():
                linear.pack()

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, batch: ForwardBatch
    ) -> torch.Tensor:
        """token_ids, positions int64 [num_tokens] -> hidden states [num_tokens, hidden]."""
        x = F.embedding(token_ids, self.embedding)
        residual = torch.zeros_like(x)
        for layer in self.layers:
            x = layer(x, residual, positions, self.cos_sin_cache, batch)
        ops.fused_add_rms_norm(x, residual, self.norm, self.eps)
        return x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [num_rows, hidden] -> [num_rows, vocab_size] of the model's dtype."""
        return self.lm_head(hidden, None)
