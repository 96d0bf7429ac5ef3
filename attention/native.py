"""Attention by the C++ kernels, for tensors in host memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from loraplex import native
from loraplex.attention.backend import WriteAndRun
from loraplex.attention.metadata import AttentionMetadata, AttentionShape

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class PlannedNativeAttention(WriteAndRun):
    metadata: AttentionMetadata
    shape: AttentionShape

    def write_kv(self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
        """Semantics: reference.PlannedReferenceAttention.write_kv."""
        native.write_kv(k, v, k_cache, v_cache, self.metadata.slot_mapping)

    def run(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, window: int | None = None) -> Tensor:
        """Semantics: reference.PlannedReferenceAttention.run. Keys before the window cost nothing.

        A row's result depends on its request alone, and more than by rounding not on how the
        request was cut into chunks. head_dim is at most 256.
        """
        assert window in self.shape.windows
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        batch = self.metadata
        native.paged_attention(
            out, q, k_cache, v_cache, batch.block_table, batch.cu_seqlens_q, batch.seq_lens,
            self.shape.scale, window, self.shape.logits_soft_cap,
        )  # fmt: skip
        return out


@dataclass(frozen=True, slots=True)
class NativeAttention:
    """The kernels cut the batch into items of work themselves, so that there is little to plan."""

    supports_graphs: ClassVar[bool] = False
    decodes_apart: ClassVar[bool] = False

    shape: AttentionShape

    def plan(self, metadata: AttentionMetadata) -> PlannedNativeAttention:
        return PlannedNativeAttention(metadata, self.shape)
