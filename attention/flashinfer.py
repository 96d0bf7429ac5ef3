"""Attention by FlashInfer, for CUDA devices: plan once a step, run once a layer.

Batches in which every request has one query row go to a decode kernel whose plan lies at fixed
addresses, one wrapper per batch size and window, so that a CUDA graph can hold it. All others go to
a prefill kernel, one wrapper per window. A plan is in its wrapper's own memory; the workspace that
all share holds nothing but the partial sums of a run. Both kernels read the caches as strided views
of the pool (FlashInfer's persistent BatchAttention must not be used: its 32-bit page offsets wrap
in a pool of more than 8 GiB).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from flashinfer import BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper
from flashinfer.decode import fast_decode_plan

from loraplex import native
from loraplex.attention.backend import FLASHINFER_DTYPE, FLASHINFER_HEAD_DIMS
from loraplex.attention.metadata import AttentionMetadata, AttentionShape

Tensor = torch.Tensor

WORKSPACE_BYTES = 256 << 20


class _Wrapper(Protocol):
    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, out: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class PlannedFlashInferAttention:
    wrappers: dict[int | None, _Wrapper]
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


class FlashInferAttention:
    """Raises ValueError for a dtype or head_dim that FlashInfer does not serve."""

    supports_graphs = True

    def __init__(self, shape: AttentionShape) -> None:
        if shape.dtype != FLASHINFER_DTYPE or shape.head_dim not in FLASHINFER_HEAD_DIMS:
            raise ValueError(
                f"attention_backend='flashinfer' is not allowed for {shape.dtype} and a head_dim "
                f"of {shape.head_dim}: it serves {FLASHINFER_DTYPE} and {FLASHINFER_HEAD_DIMS}"
            )
        self._shape = shape
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=shape.device)
        # By number of requests and window.
        self._decode_wrappers: dict[tuple[int, int | None], BatchDecodeWithPagedKVCacheWrapper] = {}
        self._prefill_wrappers = {
            window: BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD", backend="fa2")
            for window in shape.windows
        }
        # [indptr of pages | tokens in the last page | pages], at fixed addresses for graphs.
        self._indices_begin = 2 * shape.max_num_requests + 1
        size = self._indices_begin + shape.max_num_pages
        self._host = torch.zeros(size, dtype=torch.int32, pin_memory=True)
        self._device = torch.zeros(size, dtype=torch.int32, device=shape.device)

    def plan(self, metadata: AttentionMetadata) -> PlannedFlashInferAttention:
        """The plan before must be done with on the device's side, or at least copied there."""
        pages = self._stage_pages(metadata)
        wrappers: dict[int | None, _Wrapper] = {}
        for window in self._shape.windows:
            if metadata.max_query_len == 1:
                wrappers[window] = self._plan_decode(window, *pages)
            else:
                wrappers[window] = self._plan_prefill(window, metadata, *pages)
        return PlannedFlashInferAttention(wrappers, metadata.slot_mapping)

    def _options(self, window: int | None) -> dict[str, Any]:
        """What both kinds of wrapper are to know."""
        shape = self._shape
        return {
            "sm_scale": shape.scale,
            "q_data_type": shape.dtype,
            "kv_data_type": shape.dtype,
            "logits_soft_cap": shape.logits_soft_cap,
            # Tokens to the left of a row's own.
            "window_left": -1 if window is None else window - 1,
        }

    def _stage_pages(self, metadata: AttentionMetadata) -> tuple[Tensor, Tensor, Tensor]:
        """Upload the batch's pages; returns their indptr on the host, the pages on the device, and
        the tokens in each request's last page on the host."""
        block_size, num_requests = self._shape.block_size, len(metadata.seq_lens)
        host = self._host.numpy()
        seq_lens = metadata.seq_lens.numpy()
        num_blocks = -(-seq_lens // block_size)
        indptr = host[: num_requests + 1]
        np.cumsum(num_blocks, out=indptr[1:])
        last_begin = self._shape.max_num_requests + 1
        host[last_begin : last_begin + num_requests] = (seq_lens - 1) % block_size + 1
        table = metadata.block_table.numpy()
        is_used = np.arange(table.shape[1]) < num_blocks[:, None]
        num_indices = int(indptr[num_requests])
        host[self._indices_begin : self._indices_begin + num_indices] = table[is_used]
        end = self._indices_begin + num_indices
        self._device[:end].copy_(self._host[:end], non_blocking=True)
        return (
            self._host[: num_requests + 1],
            self._device[self._indices_begin : end],
            self._host[last_begin : last_begin + num_requests],
        )

    def _plan_prefill(
        self,
        window: int | None,
        metadata: AttentionMetadata,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
    ) -> BatchPrefillWithPagedKVCacheWrapper:
        shape = self._shape
        wrapper = self._prefill_wrappers[window]
        wrapper.plan(
            metadata.cu_seqlens_q, indptr, indices, last_page_len,
            shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.block_size,
            causal=True, max_token_per_sequence=metadata.max_query_len, **self._options(window),
        )  # fmt: skip
        return wrapper

    def _plan_decode(
        self, window: int | None, indptr: Tensor, indices: Tensor, last_page_len: Tensor
    ) -> BatchDecodeWithPagedKVCacheWrapper:
        shape, num_requests = self._shape, len(last_page_len)
        arguments = (
            indptr, indices, last_page_len,
            shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.block_size,
        )  # fmt: skip
        options = self._options(window)
        wrapper = self._decode_wrappers.get((num_requests, window))
        if wrapper is None:
            last_begin = shape.max_num_requests + 1
            wrapper = BatchDecodeWithPagedKVCacheWrapper(
                self._workspace,
                "NHD",
                use_cuda_graph=True,
                use_tensor_cores=True,
                paged_kv_indptr_buffer=self._device[: num_requests + 1],
                paged_kv_indices_buffer=self._device[self._indices_begin :],
                paged_kv_last_page_len_buffer=self._device[last_begin:][:num_requests],
            )
            wrapper.plan(*arguments, **options)
            self._decode_wrappers[num_requests, window] = wrapper
        # The pages are where the wrapper reads them already.
        fast_decode_plan(wrapper, *arguments, **options, global_override_indptr_cpu=indptr)
        return wrapper
