"""LoRA on the linears of experts: how adapters have it, and which rows of a step are whose.

PEFT has it in two forms. Of models whose experts are one parameter, [num_experts, out_features,
in_features], A is [num_experts * rank, in_features], expert by expert, and B [out_features, rank *
num_experts], rank by rank. Of models before that, each expert's linears are modules of their own,
as in "experts.3.w1". Either way there is one module here, "experts.gate_up_proj" or
"experts.down_proj", whose matrices are stacked by expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from loraplex.lora.fusion import Part, group_by_place
from loraplex.lora.image import AdapterWeights
from loraplex.lora.peft_config import MAX_RANK
from loraplex.lora.spec import AdapterError, BaseModelSpec, LoRAModule

Tensor = torch.Tensor


# -- loading ---------------------------------------------------------------------------------


def split_parts(parts: Sequence[Part], spec: BaseModelSpec) -> tuple[list[Part], list[Part]]:
    """Those of plain linears, and those of experts."""
    plain: list[Part] = []
    of_experts: list[Part] = []
    for part in parts:
        (of_experts if spec.modules[part.place[1]].num_experts > 1 else plain).append(part)
    return plain, of_experts


def place_experts(
    weights: AdapterWeights,
    parts: Sequence[Part],
    tensors: Callable[[str], Tensor],
    spec: BaseModelSpec,
) -> None:
    """Put the tensors, by name, of modules of experts where they belong in the weights.

    Experts whose rank is below that of others at the place get ranks of zeros."""
    for place, here in group_by_place(parts).items():
        module = spec.modules[place[1]]
        if here[0].expert is None and here[0].target == slice(0, module.out_features):
            weights.a[place], weights.b[place] = _split(here[0], tensors)
            weights.scalings[place] = here[0].module.scaling
            continue
        ranks = [0] * module.num_experts
        for part in here:
            for expert in _experts_of(part, module):
                ranks[expert] += part.module.rank
        rank, used = max(ranks), [0] * module.num_experts
        if rank > MAX_RANK:
            raise AdapterError(
                f"tensor {here[0].module.tensor_a!r} is for a part of {spec.module_path(*place)}, "
                f"where ranks add up to {rank}: the sum must be at most {MAX_RANK}"
            )
        a = weights.a[place] = torch.zeros(module.num_experts, rank, module.in_features)
        b = weights.b[place] = torch.zeros(module.num_experts, module.out_features, rank)
        for part in here:
            experts = _experts_of(part, module)
            for expert, own_a, own_b in zip(experts, *_split(part, tensors), strict=True):
                own = slice(used[expert], used[expert] + part.module.rank)
                used[expert] = own.stop
                a[expert, own] = own_a
                b[expert, part.target, own] = own_b * part.module.scaling


def _experts_of(part: Part, module: LoRAModule) -> Sequence[int]:
    return range(module.num_experts) if part.expert is None else [part.expert]


def _split(part: Part, tensors: Callable[[str], Tensor]) -> tuple[Tensor, Tensor]:
    """A [experts, rank, in_features] and B [experts, out_features, rank], of one or all."""
    rank = part.module.rank
    a, b = tensors(part.module.tensor_a), tensors(part.module.tensor_b)[part.source]
    a = a.unflatten(0, (-1, rank))
    return a, b.unflatten(1, (rank, -1)).permute(2, 0, 1).contiguous()


# -- a step ----------------------------------------------------------------------------------


class Routing(Protocol):
    """Rows that are sorted by expert; each is of a row of the batch."""

    ends: Tensor  # int32 [num_experts], where the rows of each expert end
    tokens: Tensor  # int64 [num_rows], the batch's rows, ascending within an expert


def expert_segments(segment_indptr: Tensor, routing: Routing) -> Tensor:
    """Where the segments of a step's rows begin and end among the rows of each expert:
    segment_indptr [num_segments + 1] -> int32 [num_experts, num_segments + 1]; see lora/ops.py."""
    num_tokens = len(routing.tokens)  # as many as the batch has rows, at least
    experts = torch.arange(len(routing.ends))
    sizes = routing.ends.diff(prepend=routing.ends.new_zeros(1))
    keys = experts.repeat_interleave(sizes) * num_tokens + routing.tokens
    return torch.searchsorted(keys, experts[:, None] * num_tokens + segment_indptr, out_int32=True)
