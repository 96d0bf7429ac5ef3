"""The interface of attention backends, and their registry: plan once a step, run once a layer."""

from __future__ import annotations

import logging
from importlib import import_module
from typing import Protocol

import torch

from loraplex.attention.metadata import AttentionMetadata, AttentionShape

logger = logging.getLogger(__name__)

# FlashInfer compiles for others (80, 96) as well, but gives wrong results.
FLASHINFER_DTYPE = torch.bfloat16
FLASHINFER_HEAD_DIMS = (64, 128, 256)

Tensor = torch.Tensor


class PlannedAttention(Protocol):
    """Attention over one step's batch; serves all layers.

    A cache is one layer's view of the pool, [num_pages, block_size, num_kv_heads, head_dim], of any
    strides but 1 in the last dimension, and of the shape's kv_dtype; q, k and v are of its dtype.
    """

    def write_kv(self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
        """Writes rows of k and v, [num_tokens, num_kv_heads, head_dim], to the batch's slots.

        They are rounded to the caches' dtype; what is beyond its greatest number becomes that.
        """
        ...

    def run(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, window: int | None = None) -> Tensor:
        """softmax(scale * q K^T) V, causal; q [num_tokens, num_heads, head_dim], result likewise.

        A row sees `window` tokens, itself the last of them, or all if None; it must be one of the
        shape's windows. Scores are capped as the shape says. Rows of the result that belong to no
        request may hold anything.
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
    "sdpa": ("loraplex.attention.sdpa", "SdpaAttention"),
}
# Of those that do not serve every device.
_DEVICE_TYPES = {"flashinfer": "cuda", "native": "cpu"}


def get_backend(name: str, shape: AttentionShape) -> AttentionBackend:
    """The backend of that name; "auto" is native on the CPU, and on CUDA devices flashinfer, sdpa
    for what flashinfer does not serve, or reference for what neither serves.

    Raises ValueError for an unknown name, and for a shape or device that the backend cannot serve.
    """
    if name == "auto":
        name = _choose(shape)
    home = _HOMES.get(name)
    if home is None:
        allowed = ", ".join(map(repr, ("auto", *_HOMES)))
        raise ValueError(f"attention_backend={name!r} is not allowed: it must be one of {allowed}")
    if _DEVICE_TYPES.get(name, shape.device.type) != shape.device.type:
        raise ValueError(
            f"attention_backend={name!r} is not allowed on the device {str(shape.device)!r}: "
            "flashinfer serves CUDA devices, native the CPU, and sdpa and reference both"
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
    if shape.dtype == FLASHINFER_DTYPE and shape.head_dim in FLASHINFER_HEAD_DIMS:
        return "flashinfer"
    # torch's own attention has no soft cap.
    name, speed = ("reference", "slow") if shape.logits_soft_cap else ("sdpa", "slower")
    logger.warning(
        "FlashInfer does not serve %s with a head_dim of %d: attention is by the backend %r, which "
        "is %s", shape.dtype, shape.head_dim, name, speed,
    )  # fmt: skip
    return name
