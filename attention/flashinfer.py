"""Attention by FlashInfer, for CUDA devices: plan once a step, run once a layer.

Everything goes to FlashInfer's prefill kernel, which takes requests that decode as prompts of one
row. Steps for a graph have wrappers of their own, one for each number of rows, whose plans lie at
fixed addresses. A plan is in its wrapper's own memory; the workspace that all share holds nothing
but the partial sums of a run. The caches are strided views of the pool (FlashInfer's persistent
BatchAttention must not be used: its 32-bit page offsets wrap in a pool of more than 8 GiB), of
bfloat16 or float8: the kernel makes bfloat16 of what it loads, on any GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flashinfer import BatchPrefillWithPagedKVCacheWrapper

from loraplex import native
from loraplex.attention.backend import FLASHINFER_DTYPE, FLASHINFER_HEAD_DIMS, WriteAndRun
from loraplex.attention.metadata import AttentionMetadata, AttentionShape

Tensor = torch.Tensor

MIN_WORKSPACE_BYTES = 256 << 20
# Rows of a tile (query rows times the query heads of a key head) in plans for graphs: the smallest
# that holds one row, as FlashInfer chooses.
TILE_ROWS = (16, 64, 128)


@dataclass(frozen=True, slots=True)
class PlannedFlashInferAttention(WriteAndRun):
    wrappers: dict[int | None, BatchPrefillWithPagedKVCacheWrapper]
    """By window."""
    slot_mapping: Tensor

    def write_kv(self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
        """Semantics: reference.PlannedReferenceAttention.write_kv."""
        native.write_kv(k, v, k_cache, v_cache, self.slot_mapping)

    def run(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, window: int | None = None) -> Tensor:
        """Semantics: reference.PlannedReferenceAttention.run, with weights in bfloat16 and an
        approximate tanh (to 2 ** -11)."""
        assert window in self.wrappers
        # The wrapper would fill an output of its own with zeros first.
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        return self.wrappers[window].run(q, (k_cache, v_cache), out=out)


@dataclass(frozen=True, slots=True)
class _StagedPages:
    """A step's requests and their pages, on their way to the device. Sides are host and device."""

    qo_indptr: tuple[Tensor, Tensor]  # int32 [num_requests + 1]
    kv_indptr: tuple[Tensor, Tensor]  # int32 [num_requests + 1], of kv_indices
    last_page_len: tuple[Tensor, Tensor]  # int32 [num_requests]
    kv_indices: Tensor  # int32, on the device; as long as the buffer that it is in
    num_indices: int
    seq_lens: Tensor  # int32 [num_requests], on the host


class _Buffers:
    """[indptr of query rows | indptr of pages | tokens in last pages | pages], at fixed addresses
    for graphs, and copied at once."""

    def __init__(self, shape: AttentionShape) -> None:
        self._block_size = shape.block_size
        most = shape.max_num_requests
        self._begins = [0, most + 1, 2 * (most + 1), 3 * most + 2]
        size = self._begins[-1] + shape.max_num_pages
        self._host = torch.zeros(size, dtype=torch.int32, pin_memory=True)
        self._device = torch.zeros(size, dtype=torch.int32, device=shape.device)

    def stage(self, metadata: AttentionMetadata) -> _StagedPages:
        """Copy a step's pages to the device; requests without rows are added for a graph."""
        num_real = len(metadata.seq_lens)
        num_requests = metadata.graph_num_tokens or num_real
        qo_begin, kv_begin, last_begin, pages_begin = self._begins
        host = self._host.numpy()
        seq_lens = np.zeros(num_requests, np.int32)
        seq_lens[:num_real] = metadata.seq_lens.numpy()
        num_blocks = -(-seq_lens // self._block_size)
        host[qo_begin : qo_begin + num_real + 1] = metadata.cu_seqlens_q.numpy()
        host[qo_begin + num_real + 1 : qo_begin + num_requests + 1] = metadata.cu_seqlens_q[-1]
        np.cumsum(num_blocks, out=host[kv_begin + 1 : kv_begin + num_requests + 1])
        num_indices = int(host[kv_begin + num_requests])
        host[last_begin : last_begin + num_requests] = (seq_lens - 1) % self._block_size + 1
        table = metadata.block_table.numpy()
        is_used = np.arange(table.shape[1]) < num_blocks[:num_real, None]
        host[pages_begin : pages_begin + num_indices] = table[is_used]
        end = pages_begin + num_indices
        self._device[:end].copy_(self._host[:end], non_blocking=True)

        def both(begin: int, size: int) -> tuple[Tensor, Tensor]:
            return self._host[begin : begin + size], self._device[begin : begin + size]

        return _StagedPages(
            both(qo_begin, num_requests + 1),
            both(kv_begin, num_requests + 1),
            both(last_begin, num_requests),
            self._device[pages_begin:],
            num_indices,
            torch.from_numpy(seq_lens),
        )


class _WindowPlanner:
    """Plans for layers of one window."""

    def __init__(self, shape: AttentionShape, window: int | None, workspace: Tensor) -> None:
        self._shape = shape
        # Tokens to the left of a row's own.
        self._window_left = -1 if window is None else window - 1
        self._workspace = workspace
        self._wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="fa2")
        self._of_graphs: dict[int, BatchPrefillWithPagedKVCacheWrapper] = {}

    def plan(self, metadata: AttentionMetadata, pages: _StagedPages) -> Any:
        if metadata.graph_num_tokens is not None:
            return self._plan_for_graph(metadata.graph_num_tokens, pages)
        self._plan_whole(self._wrapper, pages)
        return self._wrapper

    def _plan_whole(
        self, wrapper: BatchPrefillWithPagedKVCacheWrapper, pages: _StagedPages
    ) -> None:
        shape = self._shape
        wrapper.plan(
            pages.qo_indptr[0], pages.kv_indptr[0], pages.kv_indices[: pages.num_indices],
            pages.last_page_len[0], shape.num_heads, shape.num_kv_heads, shape.head_dim,
            shape.block_size, causal=True, sm_scale=shape.scale, q_data_type=shape.dtype,
            kv_data_type=shape.kv_dtype, logits_soft_cap=shape.logits_soft_cap,
            window_left=self._window_left, max_token_per_sequence=0, seq_lens=pages.seq_lens,
        )  # fmt: skip

    def _plan_for_graph(self, num_tokens: int, pages: _StagedPages) -> Any:
        wrapper = self._of_graphs.get(num_tokens)
        if wrapper is None:
            wrapper = self._of_graphs[num_tokens] = self._make_for_graph(num_tokens, pages)
        shape = self._shape
        # What `plan` does for graphs, without its copies (the pages are where the wrapper reads
        # them) and its loops over tensors in Python, which take a millisecond.
        wrapper._plan_info = wrapper._cached_module.plan(
            wrapper._float_workspace_buffer, wrapper._int_workspace_buffer,
            wrapper._pin_memory_int_workspace_buffer, pages.qo_indptr[0], pages.kv_indptr[0],
            pages.seq_lens, num_tokens, num_tokens, shape.num_heads, shape.num_kv_heads,
            shape.block_size, True, shape.head_dim, shape.head_dim, True, self._window_left,
            -1, False, 0,
        )  # fmt: skip
        return wrapper

    def _make_for_graph(
        self, num_tokens: int, pages: _StagedPages
    ) -> BatchPrefillWithPagedKVCacheWrapper:
        wrapper = BatchPrefillWithPagedKVCacheWrapper(
            self._workspace,
            "NHD",
            use_cuda_graph=True,
            qo_indptr_buf=pages.qo_indptr[1],
            paged_kv_indptr_buf=pages.kv_indptr[1],
            paged_kv_indices_buf=pages.kv_indices,
            paged_kv_last_page_len_buf=pages.last_page_len[1],
            backend="fa2",
        )
        # Of a step there is one plan, so that all can lie in the same place.
        for other in self._of_graphs.values():
            wrapper._int_workspace_buffer = other._int_workspace_buffer
            wrapper._pin_memory_int_workspace_buffer = other._pin_memory_int_workspace_buffer
        wrapper._max_total_num_rows = num_tokens
        self._plan_whole(wrapper, pages)
        # Queries always have all of the graph's rows.
        wrapper._qo_indptr_last = num_tokens
        return wrapper


class FlashInferAttention:
    """Raises ValueError for a dtype or head_dim that FlashInfer does not serve."""

    supports_graphs = True
    decodes_apart = False

    def __init__(self, shape: AttentionShape) -> None:
        if shape.dtype != FLASHINFER_DTYPE or shape.head_dim not in FLASHINFER_HEAD_DIMS:
            raise ValueError(
                f"attention_backend='flashinfer' is not allowed for {shape.dtype} and a head_dim "
                f"of {shape.head_dim}: it serves {FLASHINFER_DTYPE} and {FLASHINFER_HEAD_DIMS}"
            )
        workspace = torch.zeros(_workspace_bytes(shape), dtype=torch.uint8, device=shape.device)
        self._buffers = _Buffers(shape)
        self._planners = {
            window: _WindowPlanner(shape, window, workspace) for window in shape.windows
        }

    def plan(self, metadata: AttentionMetadata) -> PlannedFlashInferAttention:
        """The plan before must be done with on the device's side, or at least copied there."""
        pages = self._buffers.stage(metadata)
        wrappers = {
            window: planner.plan(metadata, pages) for window, planner in self._planners.items()
        }
        return PlannedFlashInferAttention(wrappers, metadata.slot_mapping)


def _workspace_bytes(shape: AttentionShape) -> int:
    """For the partial sums of the largest graph: of each of its tiles, all heads, float32."""
    group = shape.num_heads // shape.num_kv_heads
    rows = min((rows for rows in TILE_ROWS if rows >= group), default=TILE_ROWS[-1])
    num_tiles = shape.max_num_requests * (1 + group / rows)
    values = num_tiles * rows * shape.num_heads * (shape.head_dim + 1)
    return max(MIN_WORKSPACE_BYTES, int(4.1 * values))
