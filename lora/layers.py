"""Adds each row's own adapter to a base linear. Wraps layers, so that models stay LoRA-blind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from loraplex import native
from loraplex.lora import ops
from loraplex.lora.experts import Routing, expert_segments
from loraplex.lora.plan import NUM_SHRINK_BLOCKS, SHRINK_SUMS

Tensor = torch.Tensor
# Of native.cuda_lora_expand.
COLUMNS_AT_ONCE = 8


class LoRABatch(Protocol):
    """The adapters of a step: which rows are whose, and how to multiply by them."""

    def add(self, y: Tensor, x: Tensor, linear: WithLoRA, routing: Routing | None = None) -> None:
        """y += B A x, in place, for rows with an adapter. routing: if the linear is of experts."""
        ...


@dataclass(slots=True)
class CpuLoRABatch:
    """Rows of one adapter are a segment; rows behind the last segment are of the base model."""

    pool: Tensor  # uint8 [num_pages, page_bytes]
    segment_indptr: Tensor  # int32 [num_segments + 1]
    page_tables: Tensor  # int32 [num_segments, max_pages]
    num_modules: int
    """Modules per layer that an adapter may target, as in the images' headers."""
    shrunk: Tensor  # float32 [num_tokens, most modules of a linear, max_rank], scratch
    module_mask: int
    """Bit m is set if any of the adapters targets module m."""

    def add(self, y: Tensor, x: Tensor, linear: WithLoRA, routing: Routing | None = None) -> None:
        if not linear.module_mask & self.module_mask:
            return
        segment_indptr, shrunk = self.segment_indptr, self.shrunk[:, : len(linear.modules)]
        if routing is not None:
            segment_indptr = expert_segments(segment_indptr, routing)
            shrunk = shrunk.new_empty(len(x), *shrunk.shape[1:])
        adapters = self.pool, segment_indptr, self.page_tables
        ops.shrink(shrunk, x, *adapters, linear.layer, linear.modules, self.num_modules)
        ops.expand(
            y, shrunk, *adapters, linear.layer, linear.modules, self.num_modules, linear.offsets
        )


def shrink_scratch(device: torch.device) -> native.CudaScratch:
    """Of a device, for all steps."""
    return native.CudaScratch.on(device, NUM_SHRINK_BLOCKS, SHRINK_SUMS)


@dataclass(slots=True)
class CudaLoRABatch:
    """The items of a step are on the device (see lora/plan.py), so that a graph serves any step."""

    pool: Tensor  # uint8 [num_pages, page_bytes]
    items: Tensor  # int32 [max_items, 4]
    num_items: Tensor  # int32 [1]
    pages: Tensor  # int32 [max_pages], of all items' adapters
    num_modules: int
    shrunk: Tensor  # float32 [num_tokens * most modules of a linear, max_rank], scratch
    scratch: native.CudaScratch
    module_mask: int
    """Bit m is set if any of the adapters targets module m."""

    def add(self, y: Tensor, x: Tensor, linear: WithLoRA, routing: Routing | None = None) -> None:
        assert routing is None, "no adapter with experts is let in"
        if not linear.module_mask & self.module_mask:
            return
        num_tokens, group_size = x.shape[0], len(linear.modules)
        row_size = self.shrunk.shape[1]
        shrunk = self.shrunk.view(-1)[: num_tokens * group_size * row_size]
        shrunk = shrunk.view(num_tokens, group_size, row_size)
        plan = (
            self.pool, self.items, self.num_items, self.pages, linear.layer, linear.modules,
            self.num_modules,
        )  # fmt: skip
        native.cuda_lora_shrink(shrunk, x, self.scratch.partials, self.scratch.flags, *plan)
        # The kernel writes 8 columns at once. A router may have fewer, or 8 do not divide them.
        missing = -y.shape[1] % COLUMNS_AT_ONCE
        padded = F.pad(y, (0, missing)) if missing else y
        offsets = [*linear.offsets[:-1], padded.shape[1]]
        native.cuda_lora_expand(padded, shrunk, *plan, offsets)
        if missing:
            y.copy_(padded[:, : y.shape[1]])


class BatchWithLoRA(Protocol):
    """What LinearWithLoRA asks of the batch: its adapters, None where no row has one."""

    lora: LoRABatch | None


class BaseLinear(Protocol):
    in_features: int

    def __call__(self, x: Tensor, batch: BatchWithLoRA | None) -> Tensor: ...


class BaseExperts(Protocol):
    """A linear of each expert."""

    def __call__(self, x: Tensor, batch: BatchWithLoRA | None, routing: Any) -> Tensor: ...


class WithLoRA:
    """Where a linear's adapters are.

    It may fuse several modules (q, k, v); `modules` are their ids in the adapter images and
    `out_features` their widths in the output.
    """

    def __init__(self, layer: int, modules: Sequence[int], out_features: Sequence[int]) -> None:
        self.layer = layer
        self.modules = list(modules)
        self.module_mask = sum(1 << module for module in modules)
        self.offsets = [0, *accumulate(out_features)]


class LinearWithLoRA(WithLoRA):
    """y = base(x), and += B A x for rows with an adapter."""

    def __init__(
        self, base: BaseLinear, layer: int, modules: Sequence[int], out_features: Sequence[int]
    ) -> None:
        super().__init__(layer, modules, out_features)
        self.base = base

    def __call__(self, x: Tensor, batch: BatchWithLoRA) -> Tensor:
        y = self.base(x, batch)
        if batch.lora is not None:
            batch.lora.add(y, x, self)
        return y


class ExpertsWithLoRA(WithLoRA):
    """The same for a linear of each expert, of which every row takes one."""

    def __init__(
        self, base: BaseExperts, layer: int, modules: Sequence[int], out_features: Sequence[int]
    ) -> None:
        super().__init__(layer, modules, out_features)
        self.base = base

    def __call__(self, x: Tensor, batch: BatchWithLoRA, routing: Routing) -> Tensor:
        y = self.base(x, batch, routing)
        if batch.lora is not None:
            batch.lora.add(y, x, self, routing)
        return y
