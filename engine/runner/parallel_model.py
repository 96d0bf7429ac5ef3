"""Lets the shares of a model, one in each process, compute together.

Each process has a part of q, k, v, gate and up, and so of what attention and activation give; its
out and down projections make a summand of the whole of it. Embedding and head have a part of the
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from loraplex.engine.models.blocks import WholeNormSplit
from loraplex.engine.models.decoder import Decoder
from loraplex.engine.models.layers import RMSNorm
from loraplex.engine.models.shards import Shard, summed_linears

Tensor = torch.Tensor
# Groups that are made by hand, unlike torch's default one, belong to one engine. (They are typed on
# some builds of torch only.)
dist: Any = torch.distributed
# How long the others may take to come to a sum: as long as a model loads.
TIMEOUT = timedelta(minutes=30)


class Group:
    """The processes that have a share each. All call the same methods in the same order."""

    def __init__(self, directory: Path, shard: Shard, device: torch.device) -> None:
        """directory: where they meet; it is empty at first, and the same for all."""
        self.shard = shard
        place = dist.FileStore(str(directory / "meeting"), shard.count), shard.index, shard.count
        if device.type == "cuda":
            self._group = dist.ProcessGroupNCCL(*place, dist.ProcessGroupNCCL.Options())
        else:
            self._group = dist.ProcessGroupGloo(*place, TIMEOUT)
        self._device = device

    def add_up(self, x: Tensor) -> Tensor:
        """The sum of all processes' x, in place."""
        self._group.allreduce([x]).wait()
        return x

    def join_columns(self, x: Tensor) -> Tensor:
        """All processes' [rows, columns] side by side."""
        parts = [torch.empty_like(x) for _ in range(self.shard.count)]
        self._group.allgather([parts], [x.contiguous()]).wait()
        return torch.cat(parts, dim=-1)

    def smallest(self, number: int) -> int:
        """The smallest of all processes' numbers."""
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp(dist.ReduceOp.MIN)
        numbers = torch.tensor([number], device=self._device)
        self._group.allreduce([numbers], options).wait()
        return int(numbers)


class SummedLinear:
    """A linear of which each process has some of the inputs."""

    def __init__(self, linear: Callable[[Tensor, Any], Tensor], group: Group) -> None:
        self._linear = linear
        self._group = group

    def __call__(self, x: Tensor, batch: Any) -> Tensor:
        return self._group.add_up(self._linear(x, batch))


class JoinedHead:
    """A head of which each process has some of the vocabulary."""

    def __init__(self, head: Callable[[Tensor, Any], Tensor], group: Group) -> None:
        self._head = head
        self._group = group

    def __call__(self, hidden: Tensor, batch: Any) -> Tensor:
        return self._group.join_columns(self._head(hidden, batch))


class SummedTable:
    """An embedding of which each process has some of the vocabulary."""

    def __init__(self, rows: Tensor, group: Group) -> None:
        self.rows = rows
        self._first_id = group.shard.index * len(rows)
        self._group = group

    def __call__(self, token_ids: Tensor) -> Tensor:
        indices = token_ids - self._first_id
        is_here = (indices >= 0) & (indices < len(self.rows))
        x = F.embedding(indices.where(is_here, 0), self.rows)
        return self._group.add_up(x * is_here.unsqueeze(-1))


class JoinedNormSplit(WholeNormSplit):
    """Norms rows of heads of which each process has as many."""

    def __init__(self, split: WholeNormSplit, group: Group) -> None:
        super().__init__(split.heads, split.q_norm, split.k_norm)
        self._group = group

    def norm(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        squares = [x.float().square().mean(-1) for x in (q, k)]
        of_q, of_k = self._group.add_up(torch.stack(squares)) / self._group.shard.count
        return _norm(q, of_q, self.q_norm), _norm(k, of_k, self.k_norm)


def _norm(x: Tensor, mean_square: Tensor, norm: RMSNorm) -> Tensor:
    root = (mean_square + norm.eps).rsqrt()
    return (x.float() * root.unsqueeze(-1) * norm.weight.float()).to(x.dtype)


def join_model(model: Decoder, group: Group) -> None:
    """Have a share compute with the others. What adapters attach to is wrapped already: a sum is of
    their products, too. Their parts in embedding and head are the same in all processes, which
    apply them to what they have joined."""
    for layer in model.layers:
        for owner, name in summed_linears(layer):
            setattr(owner, name, SummedLinear(getattr(owner, name), group))
        if isinstance(layer.attention.split, WholeNormSplit):
            layer.attention.split = JoinedNormSplit(layer.attention.split, group)
    setattr(model, "tokens", SummedTable(model.embedding, group))  # noqa: B010 (for its type)
    head: Any = model.lm_head
    head.base = JoinedHead(head.base, group)
