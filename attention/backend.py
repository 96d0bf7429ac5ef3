"""The interface of attention backends, and their registry: plan once a step, run once a layer."""

from __future__ import annotations

from importlib import import_module
from typing import Protocol

import torch

from loraplex.attention.metadata import AttentionMetadata, AttentionShape

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
    def __call__(self, shape: AttentionShape) -> AttentionBackend: ...


_HOMES = {
    "flashinfer": ("loraplex.attention.flashinfer", "FlashInferAttention"),
    "native": ("loraplex.attention.native", "NativeAttention"),
    "reference": ("loraplex.attention.reference", "ReferenceAttention"),
}


def get_backend(name: str, shape: AttentionShape) -> AttentionBackend:
    """The backend of that name; "auto" is flashinfer on CUDA devices and native on the CPU.

    Raises ValueError for an unknown name, and for a shape or device that the backend cannot serve.
    """
    if name == "auto":
        name = "native" if shape.device.type == "cpu" else "flashinfer"
    home = _HOMES.get(name)
    if home is None:
        allowed = ", ".join(map(repr, ("auto", *_HOMES)))
        raise ValueError(f"attention_backend={name!r} is not allowed: it must be one of {allowed}")
    if name != "reference" and (name == "native") != (shape.device.type == "cpu"):
        raise ValueError(
            f"attention_backend={name!r} is not allowed on the device {str(shape.device)!r}: "
            "flashinfer serves CUDA devices, native the CPU, and reference both"
        )
    module, attribute = home
    make: _MakeBackend = getattr(import_module(module), attribute)
    return make(shape)
