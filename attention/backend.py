"""The interface of attention backends, and their registry: plan once a step, run once a layer."""

from __future__ import annotations

import logging
from importlib import import_module
from typing import Protocol

import torch

from loraplex.attention.metadata import AttentionMetadata, AttentionShape

logger = logging.getLogger(__name__)

# FlashInfer compiles for others (80, 96) as well, but gives wrong results.
FLASHINFER_HEAD_DIMS = (64, 128, 256)

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

    @property
    def supports_graphs(self) -> bool:
        """Whether what `run` launches for batches of one graph_num_tokens stays the same but for
        what `plan` leaves at fixed addresses, so that a CUDA graph can hold it."""
        ...

    def plan(self, metadata: AttentionMetadata) -> PlannedAttention: ...


class _MakeBackend(Protocol):
    def __call__(self, shape: AttentionShape) -> AttentionBackend: ...


_HOMES = {
    "flashinfer": ("loraplex.attention.flashinfer", "FlashInferAttention"),
    "native": ("loraplex.attention.native", "NativeAttention"),
    "reference": ("loraplex.attention.reference", "ReferenceAttention"),
}


def get_backend(name: str, shape: AttentionShape) -> AttentionBackend:
    """The backend of that name; "auto" is native on the CPU, and on CUDA devices flashinfer, or
    reference for what flashinfer does not serve.

    Raises ValueError for an unknown name, and for a shape or device that the backend cannot serve.
    """
    if name == "auto":
        name = _choose(shape)
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
    try:
        make: _MakeBackend = getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ValueError(
            f"attention_backend={name!r} is not allowed here: the package is not installed; "
            "pip install 'loraplex[cuda]' brings it"
        ) from error
    return make(shape)


def _choose(shape: AttentionShape) -> str:
    if shape.device.type == "cpu":
        return "native"
    if shape.dtype == torch.bfloat16 and shape.head_dim in FLASHINFER_HEAD_DIMS:
        return "flashinfer"
    logger.warning(
        "FlashInfer does not serve %s with a head_dim of %d: attention is by plain torch, which is "
        "slow", shape.dtype, shape.head_dim,
    )  # fmt: skip
    return "reference"
