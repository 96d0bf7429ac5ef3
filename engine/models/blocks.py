"""What transformer blocks are made of, and the ways in which they are put together.

A block takes x, the output of the block before, and `residual`, the stream that x is yet to be
added to, in place; it returns its own output. So the norm that begins a block adds as it goes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from loraplex.engine.models.layers import Linear, Module, Norm
from loraplex.engine.models.rope import Rope

Tensor = torch.Tensor


class ForwardBatch(Protocol):
    """What a model asks of the batch it computes."""

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None = None
    ) -> Tensor:
        """Write k and v to the KV cache of the layer and attend to it.

        q [num_tokens, num_heads, head_dim], k and v [num_tokens, num_kv_heads, head_dim];
        returns [num_tokens, num_heads * head_dim]. A row sees `window` tokens, itself the last of
        them, or all if None.
        """


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads of a model's attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim


class HeadSplit(Module):
    """Rows of qkv are all of q, all of k, all of v."""

    def __init__(self, heads: Heads) -> None:
        self.heads = heads

    def __call__(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """qkv [num_tokens, q_size + 2 kv_size] -> q, k, v [num_tokens, heads, head_dim]."""
        heads = self.heads
        q, k, v = qkv.view(qkv.shape[0], -1, heads.head_dim).split(
            [heads.num_heads, heads.num_kv_heads, heads.num_kv_heads], dim=1
        )
        return q, k, v


class HeadNormSplit(HeadSplit):
    """Norms every head of q and k by itself."""

    def __init__(self, heads: Heads, q_norm: Norm, k_norm: Norm) -> None:
        super().__init__(heads)
        self.q_norm = q_norm
        self.k_norm = k_norm

    def __call__(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().__call__(qkv)
        return self.q_norm(q), self.k_norm(k), v


class Attention(Module):
    """Projects, turns q and k by their positions, attends, projects back."""

    def __init__(
        self,
        layer: int,
        qkv_proj: Linear,
        split: HeadSplit,
        rope: Rope,
        o_proj: Linear,
        window: int | None = None,
    ) -> None:
        self.layer = layer
        self.window = window
        self.qkv_proj = qkv_proj
        self.split = split
        self.rope = rope
        self.o_proj = o_proj

    def __call__(self, x: Tensor, positions: Tensor, batch: ForwardBatch) -> Tensor:
        q, k, v = self.split(self.qkv_proj(x, batch))
        self.rope(positions, q, k)
        return self.o_proj(batch.attend(self.layer, q, k, v, self.window), batch)


class MLP(Module):
    """Up, activation, down. Where it is gated, up has the gate first, and the activation halves the
    width (ops.silu_and_mul)."""

    def __init__(
        self, up_proj: Linear, activation: Callable[[Tensor], Tensor], down_proj: Linear
    ) -> None:
        self.up_proj = up_proj
        self.activation = activation
        self.down_proj = down_proj

    def __call__(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        return self.down_proj(self.activation(self.up_proj(x, batch)), batch)


class Layer(Module):
    """One transformer block. Its class says how norms and residual stream go."""

    attention: Attention

    def __call__(
        self, x: Tensor, residual: Tensor, positions: Tensor, batch: ForwardBatch
    ) -> Tensor:
        """x, residual and the result: [num_tokens, hidden]; positions int64 [num_tokens]."""
        raise NotImplementedError


class PreNormLayer(Layer):
    """A norm before attention, and one before the MLP."""

    def __init__(
        self, attention_norm: Norm, attention: Attention, mlp_norm: Norm, mlp: MLP
    ) -> None:
        self.attention_norm = attention_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp

    def __call__(
        self, x: Tensor, residual: Tensor, positions: Tensor, batch: ForwardBatch
    ) -> Tensor:
        x = self.attention(self.attention_norm.add(x, residual), positions, batch)
        return self.mlp(self.mlp_norm.add(x, residual), batch)
