"""The interface of attention backends, and their registry: plan once a step, run once a layer."""

from __future__ import annotations

from importlib import import_module
from typing import Protocol

import torch

from loraplex.attention.metadata import AttentionMetadata

Tensor = torch.Tensor


class PlannedAttention(Protocol):
    """Attention over one step's batch; serves all layers.

    A cache is one layer's view of the pool, [num_pages, block_size, num_kv_heads, head_dim], of any
    strides but 1 in the last dimension, and of the dtype of q, k and v.
    """

    def write_kv(self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
        """Writes rows of k and v, [num_tokens, num_kv_heads, head_dim], to the batch's slots."""
        ...

    def run(self, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """softmax(scale * q K^T) V, causal; q [num_tokens, num_heads, head_dim], result likewise.

        Rows of the result that belong to no request may hold anything.
        """
        ...


class AttentionBackend(Protocol):
    """One implementation of attention."""

    def plan(self, metadata: AttentionMetadata) -> PlannedAttention: ...


class _MakeBackend(Protocol):
    def __call__(self, scale: float, block_size: int) -> AttentionBackend: ...


_HOMES = {
    "native": ("loraplex.attention.native", "NativeAttention"),
    "reference": ("loraplex.attention.reference", "ReferenceAttention"),
}


def get_backend(name: str, *, scale: float, block_size: int) -> AttentionBackend:
    """The backend of that name ("auto" is native), for a model's scale of scores and page size.

    Raises ValueError for an unknown name.
    """
    home = _HOMES.get("native" if name == "auto" else name)
    if home is None:
        allowed = ", ".join(map(repr, ("auto", *_HOMES)))
        raise ValueError(f"attention_backend={name!r} is not allowed: it must be one of {allowed}")
    module, attribute = home
    make: _MakeBackend = getattr(import_module(module), attribute)
    return make(scale=scale, block_size=block_size)
