"""Shares of a model: what tensor parallelism makes of its config and of its checkpoint's tensors.

A share is a model of its own, with some of the heads, of the MLP's width and of the vocabulary. Its
linears are smaller than the checkpoint's by a factor, in one dimension, and so are the tensors they
are stored in, quantised or not. Where a tensor has several things above each other, q, k and v say,
a share has some of each. Experts are all in every share, each with some of its width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loraplex.engine.models.blocks import (
    MLP,
    GroupedSplit,
    HeadNormSplit,
    HeadSplit,
    WholeNormSplit,
)
from loraplex.engine.models.config import head_dim, num_kv_heads
from loraplex.engine.models.decoder import Decoder
from loraplex.engine.models.moe import SparseMLP
from loraplex.lora.spec import ONE_SECTION, Section, parts_of_share, whole_size

DIVIDED_FIELDS = (
    "num_attention_heads", "intermediate_size", "moe_intermediate_size", "n_inner",
    "ffn_hidden_size", "vocab_size",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Shard:
    """Which of how many shares."""

    index: int = 0
    count: int = 1


WHOLE = Shard()


def shard_config(hf_config: Any, count: int) -> Any:
    """The config of a share. Raises ValueError naming a field that `count` does not divide."""
    if count == 1:
        return hf_config
    share = copy.deepcopy(hf_config)
    if isinstance(getattr(type(share), "head_dim", None), property):
        # Made of the number of heads, of which a share has fewer.
        share.__class__ = type(type(share).__name__, (type(share),), {"head_dim": None})
    share.head_dim = head_dim(hf_config)
    if getattr(share, "n_inner", 0) is None:
        share.n_inner = 4 * share.hidden_size
    for field in DIVIDED_FIELDS:
        value = getattr(share, field, None)
        if value is None:
            continue
        if value % count:
            raise ValueError(
                f"tensor_parallel_size={count} is not allowed: it must divide {field}={value} of "
                "this model"
            )
        setattr(share, field, value // count)
    kv_heads = num_kv_heads(hf_config)
    if kv_heads % count and count % kv_heads:
        raise ValueError(
            f"tensor_parallel_size={count} is not allowed: it must divide, or be a multiple of, "
            f"num_key_value_heads={kv_heads} of this model"
        )
    share.num_key_value_heads = max(1, kv_heads // count)
    share.num_kv_copies = max(1, count // kv_heads)
    return share


def check_shardable(outline: Any, count: int) -> None:
    """Raises ValueError for an architecture whose parts can't be divided by shape and sections
    alone."""
    is_plain = isinstance(outline, Decoder) and all(
        type(layer.attention.split) in (HeadSplit, HeadNormSplit, WholeNormSplit, GroupedSplit)
        and type(getattr(layer, "mlp", None)) in (MLP, SparseMLP)
        for layer in outline.layers
    )
    if count > 1 and not is_plain:
        raise ValueError(
            f"tensor_parallel_size={count} is not supported for {type(outline).__name__}: it must "
            "be an architecture with a class of its own, and not have norms numbered by head"
        )
    is_grouped = is_plain and isinstance(outline.layers[0].attention.split, GroupedSplit)
    if is_grouped and 1 < outline.heads.num_kv_heads < count:
        raise ValueError(
            f"tensor_parallel_size={count} is not allowed for {type(outline).__name__}: it must be "
            f"at most the number of KV heads, {outline.heads.num_kv_heads}, by which q, k and v "
            "are grouped in one tensor"
        )


def take_share(
    tensor: torch.Tensor,
    shape: torch.Size | None,
    shard: Shard,
    sections: Sequence[Section] = ONE_SECTION,
) -> torch.Tensor:
    """What a place of this shape takes of a tensor that may be larger by a factor, in one
    dimension, and has sections there if it has more outputs."""
    if shape is None or len(shape) != tensor.dim():
        return tensor
    share, whole = sum(section.size for section in sections), whole_size(sections, shard.count)
    for dimension, size in enumerate(shape):
        found = tensor.shape[dimension]
        if found != size and found * share == size * whole:
            of_share = parts_of_share(found, sections, shard.index, shard.count)
            parts = [tensor.narrow(dimension, *part) for part in of_share]
            # A view as a rule: tensors may be large.
            return parts[0] if len(parts) == 1 else torch.cat(parts, dimension)
    return tensor


def summed_linears(layer: Any) -> Iterator[tuple[Any, str]]:
    """Owner and attribute name of what gives summands of the whole's outputs."""
    yield layer.attention, "out_proj"
    if isinstance(layer.mlp, SparseMLP):
        yield layer, "mlp"  # Each token's experts are summed first.
    else:
        yield layer.mlp, "down_proj"


def drop_summed_biases(model: Any) -> None:
    """In all shares but the first: a bias is summed once."""
    for layer in model.layers:
        for owner, name in summed_linears(layer):
            bias = getattr(getattr(owner, name), "bias", None)
            if bias is not None:
                bias.zero_()
