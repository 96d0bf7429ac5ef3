"""Attention on Hopper GPUs: requests that decode by a kernel of our own, others by FlashInfer.

The kernel (csrc/cuda/decode_attention.cu) takes steps in which every request has one row; shares.py
plans its work.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from loraplex import native
from loraplex.attention.backend import MAX_STREAMED_GROUP, STREAMED_KV_HEADS, is_streamed
from loraplex.attention.flashinfer import FlashInferAttention, PlannedFlashInferAttention
from loraplex.attention.metadata import AttentionMetadata, AttentionShape
from loraplex.attention.shares import FIELDS, plan_shares

Tensor = torch.Tensor

# Of native.cuda_decode_attention's scratch, for each query head of each of a share's two parts.
PART_SUMS = 128 + 2


@dataclass(frozen=True, slots=True)
class PlannedStreamedAttention:
    pages: Tensor  # int32, of all rows
    rows: Tensor  # int32 [most rows, FIELDS]
    shares: Tensor  # int32 [num_blocks, FIELDS]
    scratch: native.CudaScratch
    scale: float

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        window: int | None = None,
    ) -> Tensor:
        """Semantics: reference.PlannedReferenceAttention; scores, weights and sums in float32."""
        assert window is None
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        native.cuda_decode_attention(
            out, q, k, v, k_cache, v_cache, self.pages, self.rows, self.shares,
            self.scratch.partials, self.scratch.flags, self.scale,
        )  # fmt: skip
        return out


class StreamedAttention:
    """Raises ValueError for a shape that it does not serve."""

    supports_graphs = True
    decodes_apart = True

    def __init__(self, shape: AttentionShape) -> None:
        if not is_streamed(shape):
            raise ValueError(
                "attention_backend='streamed' is not allowed for this model, KV cache or GPU: it "
                "serves Hopper GPUs, a head_dim of 128, pages of 16 tokens in bfloat16, "
                f"{STREAMED_KV_HEADS[0]} to {STREAMED_KV_HEADS[-1]} KV heads with at most "
                f"{MAX_STREAMED_GROUP} query heads each, and neither windows nor soft caps; "
                "'flashinfer' serves the others"
            )
        self._others = FlashInferAttention(shape)
        self._shape = shape
        num_blocks = torch.cuda.get_device_properties(shape.device).multi_processor_count
        self._scratch = native.CudaScratch.on(
            shape.device, num_blocks, 2 * shape.num_heads * PART_SUMS, (shape.num_kv_heads,)
        )
        # [shares | rows | pages], at fixed addresses for graphs, and copied at once.
        self._num_rows_end = num_blocks + shape.max_num_requests
        size = FIELDS * self._num_rows_end + shape.max_num_pages
        self._host = torch.zeros(size, dtype=torch.int32, pin_memory=True)
        self._device = torch.zeros(size, dtype=torch.int32, device=shape.device)

    def plan(
        self, metadata: AttentionMetadata
    ) -> PlannedStreamedAttention | PlannedFlashInferAttention:
        """The plan before must be done with on the device's side, or at least copied there.

        Where each row's K and V are written follows from the block table, not the slot mapping."""
        if metadata.max_query_len > 1:
            return self._others.plan(metadata)
        num_blocks, pages_begin = len(self._scratch.flags), FIELDS * self._num_rows_end
        seq_lens = metadata.seq_lens.numpy()
        rows, shares = plan_shares(seq_lens, self._shape.block_size, num_blocks)
        host, table = self._host.numpy(), metadata.block_table.numpy()
        is_used = np.arange(table.shape[1]) < (rows[:, 1] - rows[:, 0])[:, None]
        end = pages_begin + int(rows[-1, 1])
        host[: shares.size] = shares.ravel()
        host[shares.size : shares.size + rows.size] = rows.ravel()
        host[pages_begin:end] = table[is_used]
        self._device[:end].copy_(self._host[:end], non_blocking=True)
        records = self._device[:pages_begin].view(-1, FIELDS)
        return PlannedStreamedAttention(
            self._device[pages_begin:],
            records[num_blocks:],
            records[:num_blocks],
            self._scratch,
            self._shape.scale,
        )
