"""Attention in plain torch: slow, for any device; what the other backends are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from loraplex.attention.backend import WriteAndRun
from loraplex.attention.metadata import AttentionMetadata, AttentionShape

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class PlannedReferenceAttention(WriteAndRun):
    metadata: AttentionMetadata
    shape: AttentionShape

    def write_kv(self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
        """Semantics: k_cache[slot // block_size, slot % block_size] = k[token], v likewise, to the
        nearest number of the caches' dtype, or the even one of two; NaN stays NaN."""
        slots, kv_dtype = self.metadata.slot_mapping, self.shape.kv_dtype
        index = (slots // self.shape.block_size, slots % self.shape.block_size)
        if kv_dtype != self.shape.dtype:
            greatest = torch.finfo(kv_dtype).max
            k, v = (x.clamp(-greatest, greatest).to(kv_dtype) for x in (k, v))
        k_cache.index_put_(index, k)
        v_cache.index_put_(index, v)

    def run(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, window: int | None = None) -> Tensor:
        """Semantics, for each request and head, in float32 or better:

        K, V = the request's first seq_len rows, found through its block table
        scores = scale * q @ K.T, then logits_soft_cap * tanh(scores / logits_soft_cap) if not 0,
            -inf where the key is after the query, or `window` or more before it
        out = softmax(scores) @ V
        """
        assert window in self.shape.windows
        batch, cap = self.metadata, self.shape.logits_soft_cap
        bounds = batch.cu_seqlens_q.tolist()
        dtype = torch.promote_types(q.dtype, torch.float32)
        group = q.shape[1] // k_cache.shape[2]
        out = torch.zeros_like(q)
        for request, length in enumerate(batch.seq_lens.tolist()):
            rows = slice(bounds[request], bounds[request + 1])
            num_blocks = -(-length // self.shape.block_size)
            blocks = batch.block_table[request, :num_blocks].long()
            k, v = (
                cache[blocks].flatten(0, 1)[:length].to(dtype).repeat_interleave(group, dim=1)
                for cache in (k_cache, v_cache)
            )
            scores = torch.einsum("qhd,khd->hqk", q[rows].to(dtype), k) * self.shape.scale
            if cap:
                scores = cap * (scores / cap).tanh()
            num_queries = scores.shape[1]
            everything = torch.ones(num_queries, length, dtype=torch.bool, device=q.device)
            is_hidden = everything.triu(length - num_queries + 1)
            if window is not None:
                is_hidden |= everything.tril(length - num_queries - window)
            weights = scores.masked_fill(is_hidden, -torch.inf).softmax(-1)
            out[rows] = torch.einsum("hqk,khd->qhd", weights, v).to(out.dtype)
        return out


@dataclass(frozen=True, slots=True)
class ReferenceAttention:
    supports_graphs: ClassVar[bool] = False
    decodes_apart: ClassVar[bool] = False

    shape: AttentionShape

    def plan(self, metadata: AttentionMetadata) -> PlannedReferenceAttention:
        return PlannedReferenceAttention(metadata, self.shape)
