"""Batched LoRA products over rows that each have their own adapter, by the native library.

Rows of a batch are sorted so that the rows of one adapter are one segment, and rows of the base
model come last. The arguments that all ops share:

    pool            uint8 [num_pages, page_bytes], where the adapters' images are (lora/image.py)
    segment_indptr  int32 [num_segments + 1]; segment s is rows segment_indptr[s] to
                    segment_indptr[s + 1], and rows from segment_indptr[-1] on have no adapter.
                    Or, of modules of experts, [num_experts, num_segments + 1]: rows are sorted by
                    expert, and there by segment; those between an expert's last segment and the
                    next expert's first have no adapter
    page_tables     int32 [num_segments, max_pages], the pages of each segment's adapter
    layer           the layer's index
    modules         ids of the modules of a group, which share an input and lie side by side in the
                    output
    num_modules     how many modules a layer has in the images

A row's result depends on the row and its adapter alone. Reference twins: lora/reference.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loraplex import native

Tensor = torch.Tensor


def shrink(
    v: Tensor,
    x: Tensor,
    pool: Tensor,
    segment_indptr: Tensor,
    page_tables: Tensor,
    layer: int,
    modules: Sequence[int],
    num_modules: int,
) -> None:
    """v = A x for each row's adapter.

    v float32 [at least the rows with an adapter, len(modules), max_rank], x [num_tokens,
    in_features] of the pool's dtype (bfloat16 or float32). Entries of v past an adapter's rank, and
    of modules that it does not target, may hold anything.

    Semantics, for each row t with an adapter, and each module m of the group:
        v[t, m, :rank] = A[m, expert of t] @ x[t], summed in float32
    """
    native.lora_shrink(v, x, pool, segment_indptr, page_tables, layer, modules, num_modules)


def expand(
    y: Tensor,
    v: Tensor,
    pool: Tensor,
    segment_indptr: Tensor,
    page_tables: Tensor,
    layer: int,
    modules: Sequence[int],
    num_modules: int,
    offsets: Sequence[int],
) -> None:
    """y += B v for each row's adapter; B includes the adapter's scaling.

    y [num_tokens, total_out] of the pool's dtype, in place; v as shrink leaves it; offsets: module
    m of the group adds to columns offsets[m] to offsets[m + 1] of y.

    Semantics, for each row t with an adapter, and each module m of the group that it targets:
        y[t, offsets[m] : offsets[m + 1]] += B[m, expert of t] @ v[t, m, :rank], in float32,
        rounded once
    """
    native.lora_expand(
        y, v, pool, segment_indptr, page_tables, layer, modules, num_modules, offsets
    )
