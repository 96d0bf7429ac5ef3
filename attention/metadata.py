"""What attention needs to know of a step's batch. Knows no requests and no owners of pages."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """One step's batch, as attention sees it.

    The query rows of request r are rows cu_seqlens_q[r]..cu_seqlens_q[r + 1] of the batch, and the
    last of its seq_lens[r] tokens; each sees itself and what is before it.
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
