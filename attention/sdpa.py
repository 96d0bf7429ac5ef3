"""Attention by torch's scaled_dot_product_attention, for what FlashInfer does not serve: other
dtypes, and head_dims like 80, 96 and 112. For any device.

torch wants dense keys and values, so that each layer copies them out of the pages. Memory for the
copies is bounded: query rows are computed in groups. (xFormers does not serve either: its paged
masks need one stride from token to token and pages of 64 tokens, which the pool does not have.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from loraplex import native
from loraplex.attention.backend import WriteAndRun
from loraplex.attention.metadata import AttentionMetadata, AttentionShape

Tensor = torch.Tensor

# Of the keys and values that are copied at a time, but for a request that has more by itself.
MAX_COPIED_BYTES = 128 << 20
# Query rows of one request at a time.
MAX_QUERIES = 256


@dataclass(frozen=True, slots=True)
class _Piece:
    """Consecutive query rows of one request, and the keys that any of them sees."""

    request: int
    first_row: int
    num_queries: int
    first_key: int
    num_keys: int


@dataclass(frozen=True, slots=True)
class _Group:
    """Pieces that are computed together, on the device; all have as many query rows.

    Pieces with fewer keys than others have their last key again and again, and see it once.
    """

    rows: Tensor
    """int64 [num_pieces, num_queries], of the batch."""
    own_keys: Tensor
    """int64 [num_pieces, num_queries], which of its piece's keys is the row's own."""
    pages: Tensor
    """int64 [num_pieces, num_keys], where the keys are, and
    offsets int64 [num_pieces, num_keys], where in their pages."""
    offsets: Tensor

    def visible(self, window: int | None) -> Tensor:
        """bool [num_pieces, num_queries, num_keys]: which keys a row sees."""
        keys = torch.arange(self.pages.shape[1], device=self.pages.device)
        own = self.own_keys[:, :, None]
        is_visible = keys <= own
        return is_visible if window is None else is_visible & (keys > own - window)


@dataclass(frozen=True, slots=True)
class PlannedSdpaAttention(WriteAndRun):
    scale: float
    slot_mapping: Tensor
    groups: dict[int | None, list[_Group]]
    """By window."""

    def write_kv(self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
        """Semantics: reference.PlannedReferenceAttention.write_kv."""
        native.write_kv(k, v, k_cache, v_cache, self.slot_mapping)

    def run(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, window: int | None = None) -> Tensor:
        """Semantics: reference.PlannedReferenceAttention.run, without a soft cap and with weights
        in the dtype of q."""
        assert window in self.groups
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        num_kv_heads = k_cache.shape[2]
        for group in self.groups[window]:
            k, v = (
                cache[group.pages, group.offsets].to(q.dtype).transpose(1, 2)
                for cache in (k_cache, v_cache)
            )
            # Heads that share keys are rows of one product: [pieces, KV heads, rows, head_dim].
            queries = q[group.rows].unflatten(2, (num_kv_heads, -1)).transpose(1, 2)
            num_queries, per_kv_head = queries.shape[2:4]
            mask = group.visible(window).repeat_interleave(per_kv_head, dim=1)
            result = F.scaled_dot_product_attention(
                queries.flatten(2, 3), k, v, attn_mask=mask[:, None], scale=self.scale
            )
            result = result.unflatten(2, (num_queries, per_kv_head)).transpose(1, 2)
            out[group.rows] = result.flatten(2, 3)
        return out


class SdpaAttention:
    """Raises ValueError for a shape with a soft cap, which torch's attention has not."""

    supports_graphs: ClassVar[bool] = False
    decodes_apart: ClassVar[bool] = False

    def __init__(self, shape: AttentionShape) -> None:
        if shape.logits_soft_cap:
            raise ValueError(
                "attention_backend='sdpa' is not allowed for a model with "
                f"logits_soft_cap={shape.logits_soft_cap}: it serves models without"
            )
        self._shape = shape
        bytes_per_key = 2 * shape.num_kv_heads * shape.head_dim * shape.dtype.itemsize
        self._max_keys = MAX_COPIED_BYTES // bytes_per_key

    def plan(self, metadata: AttentionMetadata) -> PlannedSdpaAttention:
        groups = {
            window: [
                self._make_group(pieces, metadata)
                for pieces in self._divide(_cut(metadata, window))
            ]
            for window in self._shape.windows
        }
        return PlannedSdpaAttention(self._shape.scale, metadata.slot_mapping, groups)

    def _divide(self, pieces: list[_Piece]) -> Iterator[list[_Piece]]:
        """Groups of about as many keys each piece, so that little is copied in vain."""
        together: list[_Piece] = []
        for piece in sorted(pieces, key=lambda piece: (piece.num_queries, -piece.num_keys)):
            # Pieces of many rows are enough work alone.
            fits = piece.num_queries == 1
            if together and not (
                fits and (len(together) + 1) * together[0].num_keys <= self._max_keys
            ):
                yield together
                together = []
            together.append(piece)
        if together:
            yield together

    def _make_group(self, pieces: list[_Piece], metadata: AttentionMetadata) -> _Group:
        device, block_size = self._shape.device, self._shape.block_size
        # request, first row, first key, last key: one column each.
        table = torch.tensor(
            [(p.request, p.first_row, p.first_key, p.first_key + p.num_keys - 1) for p in pieces]
        )
        block_table = metadata.block_table[table[:, 0]].to(device, torch.int64)
        first_row, first_key, last_key = table.to(device)[:, 1:, None].unbind(1)
        num_queries, num_keys = pieces[0].num_queries, max(p.num_keys for p in pieces)
        queries = torch.arange(num_queries, device=device)
        keys = first_key + torch.arange(num_keys, device=device)
        keys = torch.minimum(keys, last_key)
        return _Group(
            rows=first_row + queries,
            own_keys=last_key - first_key - (num_queries - 1) + queries,
            pages=block_table.gather(1, keys // block_size),
            offsets=keys % block_size,
        )


def _cut(metadata: AttentionMetadata, window: int | None) -> list[_Piece]:
    """The batch's query rows, in pieces of at most MAX_QUERIES."""
    bounds, pieces = metadata.cu_seqlens_q.tolist(), list[_Piece]()
    for request, length in enumerate(metadata.seq_lens.tolist()):
        begin, end = bounds[request], bounds[request + 1]
        for row in range(begin, end, MAX_QUERIES):
            num_queries = min(MAX_QUERIES, end - row)
            # A row's own key, and those before it.
            num_seen = length - (end - row) + 1
            first_key = 0 if window is None else max(num_seen - window, 0)
            num_keys = num_seen + num_queries - 1 - first_key
            pieces.append(_Piece(request, row, num_queries, first_key, num_keys))
    return pieces
