"""What attention needs to know of the model and of a step's batch. Knows no requests, nor who owns
pages."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What stays the same from step to step."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    """Of the scores."""
    block_size: int
    """Tokens in a page."""
    dtype: torch.dtype
    """Of queries, new keys and values, and results."""
    kv_dtype: torch.dtype
    """Of the caches: dtype, or float8_e4m3fn."""
    device: torch.device
    max_num_requests: int
    """Most requests of a step, and most rows of a CUDA graph."""
    max_num_pages: int
    """Most pages of all requests of a step, each counted as often as it is used."""
    logits_soft_cap: float = 0.0
    """Scores x become logits_soft_cap * tanh(x / logits_soft_cap); 0: they stay as they are."""
    windows: tuple[int | None, ...] = (None,)
    """The distinct sliding windows of the layers: how many tokens a row sees, itself the last of
    them. None: all."""


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """One step's batch, as attention sees it.

    The query rows of request r are rows cu_seqlens_q[r]..cu_seqlens_q[r + 1] of the batch, and the
    last of its seq_lens[r] tokens; each sees itself and what is before it. All but slot_mapping is
    in host memory, where plans are made; slot_mapping is beside the caches.
    """

    cu_seqlens_q: torch.Tensor
    """int32 [num_requests + 1], begins with 0."""
    seq_lens: torch.Tensor
    """int32 [num_requests], tokens of context including this step's."""
    block_table: torch.Tensor
    """int32 [num_requests, max_blocks], the page of each block_size tokens of a request."""
    slot_mapping: torch.Tensor
    """int64 [num_tokens], page * block_size + offset where each row's K and V are written."""
    max_query_len: int
    """The most query rows of one request."""
    graph_num_tokens: int | None = None
    """Rows of the CUDA graph in which the step is to run, its own first; None: in none."""
