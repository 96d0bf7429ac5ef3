"""Adds each row's own adapter to a base linear. Wraps layers, so that models stay LoRA-blind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch

from loraplex.lora import ops


@dataclass(slots=True)
class LoRABatch:
    """The adapters of a step: which rows are whose, and where the adapters are in the pool.

    Rows of one adapter are a segment; rows behind the last segment are of the base model.
    """

    pool: torch.Tensor  # uint8 [num_pages, page_bytes]
    segment_indptr: torch.Tensor  # int32 [num_segments + 1]
    page_tables: torch.Tensor  # int32 [num_segments, max_pages]
    num_modules: int
    """Modules per layer that an adapter may target, as in the images' headers."""
    shrunk: torch.Tensor  # float32 [num_tokens, most modules of a linear, max_rank], scratch


class BatchWithLoRA(Protocol):
    """What LinearWithLoRA asks of the batch: its adapters, None where no row has one."""

    lora: LoRABatch | None


class BaseLinear(Protocol):
    def __call__(self, x: torch.Tensor, batch: BatchWithLoRA) -> torch.Tensor: ...


class LinearWithLoRA:
    """y = base(x), and += B A x for rows with an adapter.

    The base may fuse several modules (q, k, v); `modules` are their ids in the adapter images and
    `out_features` their widths in the output.
    """

    def __init__(
        self, base: BaseLinear, layer: int, modules: Sequence[int], out_features: Sequence[int]
    ) -> None:
        self.base = base
        self.layer = layer
        self.modules = list(modules)
        self.offsets = [0, *accumulate(out_features)]

    def __call__(self, x: torch.Tensor, batch: BatchWithLoRA) -> torch.Tensor:
        y = self.base(x, batch)
        if batch.lora is not None:
            self._add_adapters(y, x, batch.lora)
        return y

    def _add_adapters(self, y: torch.Tensor, x: torch.Tensor, lora: LoRABatch) -> None:
        shrunk = lora.shrunk[:, : len(self.modules)]
        adapters = lora.pool, lora.segment_indptr, lora.page_tables
        ops.shrink(shrunk, x, *adapters, self.layer, self.modules, lora.num_modules)
        ops.expand(y, shrunk, *adapters, self.layer, self.modules, lora.num_modules, self.offsets)
