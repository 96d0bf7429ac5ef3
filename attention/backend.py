"""The interface of attention backends, and their registry: plan once a step, run once a layer."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from importlib import import_module
from typing import Protocol

import torch

from loraplex.attention.metadata import AttentionMetadata, AttentionShape

logger = logging.getLogger(__name__)

# FlashInfer compiles for others (80, 96) as well, but gives wrong results.
FLASHINFER_DTYPE = torch.bfloat16
FLASHINFER_HEAD_DIMS = (64, 128, 256)
# What the kernel of csrc/cuda/decode_attention.cu is made for. With fewer heads of keys too few
# warps take part.
STREAMED_KV_HEADS = range(4, 13)
MAX_STREAMED_GROUP = 8

Tensor = torch.Tensor


class PlannedAttention(Protocol):
    """Attention over one step's batch; serves all layers.

    A cache is one layer's view of the pool, [num_pages, block_size, num_kv_heads, head_dim], of any
    strides but 1 in the last dimension, and of the shape's kv_dtype; q, k and v are of its dtype.
    """

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        window: int | None = None,
    ) -> Tensor:
        """Write k and v to the batch's slots; softmax(scale * q K^T) V, causal.

        q [num_tokens, num_heads, head_dim], result likewise; k and v [num_tokens, num_kv_heads,
        head_dim]. They are rounded to the caches' dtype; what is beyond its greatest number becomes
        that. A row sees `window` tokens, itself the last of them, or all if None; it must be one of
        the shape's windows. Scores are capped as the shape says. Rows of the result that belong to
        no request may hold anything.
        """
        ...


class WriteAndRun(ABC):
    """A planned attention that is two operations, one after the other."""

    __slots__ = ()

    @abstractmethod
    def write_kv(self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> None: ...

    @abstractmethod
    def run(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, window: int | None = None
    ) -> Tensor: ...

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        window: int | None = None,
    ) -> Tensor:
        self.write_kv(k, v, k_cache, v_cache)
        return self.run(q, k_cache, v_cache, window)


class AttentionBackend(Protocol):
    """One implementation of attention."""

    @property
    def supports_graphs(self) -> bool:
        """Whether what `run` launches for batches of one graph_num_tokens stays the same but for
        what `plan` leaves at fixed addresses, so that a CUDA graph can hold it."""
        ...

    @property
    def decodes_apart(self) -> bool:
        """Whether steps with one row of each request launch something else than others, so that
        they need graphs of their own."""
        ...

    def plan(self, metadata: AttentionMetadata) -> PlannedAttention: ...


class _MakeBackend(Protocol):
    def __call__(self, shape: AttentionShape) -> AttentionBackend: ...


_HOMES = {
    "streamed": ("loraplex.attention.streamed", "StreamedAttention"),
    "flashinfer": ("loraplex.attention.flashinfer", "FlashInferAttention"),
    "native": ("loraplex.attention.native", "NativeAttention"),
    "reference": ("loraplex.attention.reference", "ReferenceAttention"),
    "sdpa": ("loraplex.attention.sdpa", "SdpaAttention"),
}
# Of those that do not serve every device.
_DEVICE_TYPES = {"streamed": "cuda", "flashinfer": "cuda", "native": "cpu"}


def get_backend(name: str, shape: AttentionShape) -> AttentionBackend:
    """The backend of that name; "auto" is native on the CPU. On CUDA devices it is the first of
    streamed, flashinfer, sdpa and reference that serves the shape.

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
            "streamed and flashinfer serve CUDA devices, native the CPU, sdpa and reference both"
        )
    module, attribute = home
    try:
        make: _MakeBackend = getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name != "flashinfer":
            raise
        raise ValueError(
            f"attention_backend={name!r} is not allowed here: the package is not installed; "
            "pip install 'loraplex[cuda]' brings it"
        ) from error
    return make(shape)


def is_streamed(shape: AttentionShape) -> bool:
    """Whether the backend "streamed" serves a shape that flashinfer does."""
    return (
        (shape.head_dim, shape.block_size, shape.kv_dtype) == (128, 16, torch.bfloat16)
        and shape.num_kv_heads in STREAMED_KV_HEADS
        and shape.num_heads <= MAX_STREAMED_GROUP * shape.num_kv_heads
        and shape.windows == (None,)
        and shape.logits_soft_cap == 0
        and torch.cuda.get_device_capability(shape.device) == (9, 0)
    )


def _choose(shape: AttentionShape) -> str:
    if shape.device.type == "cpu":
        return "native"
    if shape.dtype == FLASHINFER_DTYPE and shape.head_dim in FLASHINFER_HEAD_DIMS:
        return "streamed" if is_streamed(shape) else "flashinfer"
    # torch's own attention has no soft cap.
    name, speed = ("reference", "slow") if shape.logits_soft_cap else ("sdpa", "slower")
    logger.warning(
        "FlashInfer does not serve %s with a head_dim of %d: attention is by the backend %r, which "
        "is %s", shape.dtype, shape.head_dim, name, speed,
    )  # fmt: skip
    return name
