"""What transformer blocks are made of, and the ways in which they are put together.

A block takes x, the output of the block before, and `residual`, the stream that x is yet to be
added to, in place; it returns its own output. So the norm that begins a block adds as it goes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from loraplex.engine.models import ops
from loraplex.engine.models.layers import Linear, Module, Norm, RMSNorm
from loraplex.engine.models.rope import Rope
from loraplex.lora.spec import Section

Tensor = torch.Tensor

Activation = Callable[[Tensor], Tensor]
# By transformers' names.
ACTIVATIONS: dict[str, Activation] = {
    "gelu": F.gelu,
    "gelu_new": ops.gelu_tanh,
    "gelu_fast": ops.gelu_tanh,
    "gelu_pytorch_tanh": ops.gelu_tanh,
    "relu": F.relu,
    "silu": F.silu,
}
GATED_ACTIVATIONS: dict[str, Activation] = {
    "gelu": ops.gelu_and_mul,
    "gelu_pytorch_tanh": ops.gelu_tanh_and_mul,
    "silu": ops.silu_and_mul,
}


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
    num_kv_copies: int = 1
    """So many shares of the model have the same KV heads."""

    @property
    def sections(self) -> tuple[Section, Section, Section]:
        """Heads of q, k and v."""
        kv_heads = Section(self.num_kv_heads, self.num_kv_copies)
        return Section(self.num_heads), kv_heads, kv_heads

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
        self.sections = tuple(
            Section(section.size * heads.head_dim, section.copies) for section in heads.sections
        )

    def __call__(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """qkv [num_tokens, q_size + 2 kv_size] -> q, k, v [num_tokens, heads, head_dim]."""
        heads = self.heads
        q, k, v = qkv.view(qkv.shape[0], -1, heads.head_dim).split(
            [heads.num_heads, heads.num_kv_heads, heads.num_kv_heads], dim=1
        )
        return q, k, v


class HeadNormSplit(HeadSplit):
    """Norms every head of q and k by itself, by the same weights or its own."""

    def __init__(self, heads: Heads, q_norm: Norm, k_norm: Norm) -> None:
        super().__init__(heads)
        self.q_norm = q_norm
        self.k_norm = k_norm

    def __call__(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().__call__(qkv)
        return self.q_norm(q), self.k_norm(k), v


class WholeNormSplit(HeadSplit):
    """Norms all heads of q as one row, and all of k."""

    def __init__(self, heads: Heads, q_norm: RMSNorm, k_norm: RMSNorm) -> None:
        super().__init__(heads)
        self.q_norm = q_norm
        self.k_norm = k_norm

    def __call__(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().__call__(qkv)
        normed_q, normed_k = self.norm(q.flatten(1), k.flatten(1))
        return normed_q.view(q.shape), normed_k.view(k.shape), v

    def norm(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Of rows: q [num_tokens, q_size], k [num_tokens, kv_size]."""
        return self.q_norm(q), self.k_norm(k)


class GroupedSplit(HeadSplit):
    """Rows of qkv go by KV head: the queries of its group, its key, its value."""

    def __init__(self, heads: Heads) -> None:
        super().__init__(heads)
        # Shares that have the same KV head have different queries of its group.
        if heads.num_kv_copies == 1:
            self.sections = (Section(heads.q_size + 2 * heads.kv_size),)

    def __call__(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.heads
        grouped = qkv.view(qkv.shape[0], heads.num_kv_heads, -1, heads.head_dim)
        return grouped[:, :, :-2].flatten(1, 2), grouped[:, :, -2], grouped[:, :, -1]


class Attention(Module):
    """Projects, turns q and k by their positions, attends, projects back."""

    def __init__(
        self,
        layer: int,
        qkv_proj: Linear,
        split: HeadSplit,
        rope: Rope,
        out_proj: Linear,
        window: int | None = None,
    ) -> None:
        self.layer = layer
        self.window = window
        self.qkv_proj = qkv_proj
        self.split = split
        self.rope = rope
        self.out_proj = out_proj

    def __call__(self, x: Tensor, positions: Tensor, batch: ForwardBatch) -> Tensor:
        q, k, v = self.split(self.qkv_proj(x, batch))
        self.rope(positions, q, k)
        return self.out_proj(batch.attend(self.layer, q, k, v, self.window), batch)


class FeedForward(Module, ABC):
    """The part of a block in which tokens are alone."""

    @abstractmethod
    def __call__(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """x and the result: [num_tokens, hidden]."""


class MLP(FeedForward):
    """Up, activation, down. Where it is gated, up has the gate first, and the activation halves the
    width (ops.silu_and_mul)."""

    def __init__(self, up_proj: Linear, activation: Activation, down_proj: Linear) -> None:
        self.up_proj = up_proj
        self.activation = activation
        self.down_proj = down_proj

    def __call__(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        return self.down_proj(self.activation(self.up_proj(x, batch)), batch)


class Layer(Module, ABC):
    """One transformer block. Its class says how norms and residual stream go."""

    attention: Attention

    @abstractmethod
    def __call__(
        self, x: Tensor, residual: Tensor, positions: Tensor, batch: ForwardBatch
    ) -> Tensor:
        """x, residual and the result: [num_tokens, hidden]; positions int64 [num_tokens]."""


class PreNormLayer(Layer):
    """A norm before attention, and one before the MLP."""

    def __init__(
        self, attention_norm: Norm, attention: Attention, mlp_norm: Norm, mlp: FeedForward
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


class SandwichNormLayer(Layer):
    """Norms before and after attention, and before and after the MLP."""

    def __init__(
        self,
        attention_norm: Norm,
        attention: Attention,
        attention_out_norm: Norm,
        mlp_norm: Norm,
        mlp: FeedForward,
        mlp_out_norm: Norm,
    ) -> None:
        self.attention_norm = attention_norm
        self.attention = attention
        self.attention_out_norm = attention_out_norm
        self.mlp_norm = mlp_norm
        self.mlp = mlp
        self.mlp_out_norm = mlp_out_norm

    def __call__(
        self, x: Tensor, residual: Tensor, positions: Tensor, batch: ForwardBatch
    ) -> Tensor:
        x = self.attention(self.attention_norm.add(x, residual), positions, batch)
        x = self.mlp_norm.add(self.attention_out_norm(x), residual)
        return self.mlp_out_norm(self.mlp(x, batch))


class PostNormLayer(Layer):
    """Norms of what attention and MLP give, none of what they take."""

    def __init__(
        self, attention: Attention, attention_norm: Norm, mlp: FeedForward, mlp_norm: Norm
    ) -> None:
        self.attention = attention
        self.attention_norm = attention_norm
        self.mlp = mlp
        self.mlp_norm = mlp_norm

    def __call__(
        self, x: Tensor, residual: Tensor, positions: Tensor, batch: ForwardBatch
    ) -> Tensor:
        residual += x
        residual += self.attention_norm(self.attention(residual, positions, batch))
        return self.mlp_norm(self.mlp(residual, batch))


class ParallelLayer(Layer):
    """Attention and MLP beside each other, behind one norm."""

    def __init__(self, norm: Norm, attention: Attention, mlp: FeedForward) -> None:
        self.norm = norm
        self.attention = attention
        self.mlp = mlp

    def __call__(
        self, x: Tensor, residual: Tensor, positions: Tensor, batch: ForwardBatch
    ) -> Tensor:
        x = self.norm.add(x, residual)
        return self.attention(x, positions, batch) + self.mlp(x, batch)


class ParallelNormsLayer(PreNormLayer):
    """Attention and MLP beside each other, behind norms of their own."""

    def __call__(
        self, x: Tensor, residual: Tensor, positions: Tensor, batch: ForwardBatch
    ) -> Tensor:
        x = self.attention(self.attention_norm.add(x, residual), positions, batch)
        return x + self.mlp(self.mlp_norm(residual), batch)


def activation(config: Any, field: str) -> Activation:
    """The one that a field of the config names. Raises ValueError if it is not supported."""
    return _find(ACTIVATIONS, config, field)


def gated_activation(config: Any, field: str) -> Activation:
    """[num_tokens, 2 * size] -> [num_tokens, size]: of the first half, times the second.

    Raises ValueError for one that is not supported.
    """
    return _find(GATED_ACTIVATIONS, config, field)


def _find(activations: dict[str, Activation], config: Any, field: str) -> Activation:
    name = getattr(config, field)
    if name not in activations:
        raise ValueError(
            f"{field}={name!r} of this model is not supported: it must be one of "
            + ", ".join(activations)
        )
    return activations[name]
