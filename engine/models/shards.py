"""Shares of a model: what tensor parallelism makes of its config and of its checkpoint's tensors.

A share is a model of its own, with some of the heads, of the MLP's width and of the vocabulary. Its
linears are smaller than the checkpoint's by a factor, in one dimension, and so are the tensors they
are stored in, quantised or not.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from loraplex.engine.models.blocks import MLP, HeadNormSplit, HeadSplit
from loraplex.engine.models.config import head_dim, num_kv_heads
from loraplex.engine.models.decoder import Decoder

DIVIDED_FIELDS = (
    "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size",
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
    share.head_dim = head_dim(hf_config)
    share.num_key_value_heads = num_kv_heads(hf_config)
    for field in DIVIDED_FIELDS:
        value = getattr(share, field)
        if value % count:
            raise ValueError(
                f"tensor_parallel_size={count} is not allowed: it must divide {field}={value} of "
                "this model"
            )
        setattr(share, field, value // count)
    return share


def check_shardable(outline: Any, count: int) -> None:
    """Raises ValueError for an architecture whose linears can't be divided by shape alone."""
    is_plain = isinstance(outline, Decoder) and all(
        type(layer.attention.split) in (HeadSplit, HeadNormSplit)
        and len(layer.attention.qkv_proj.out_features) == len(outline.QKV) == 3
        and type(getattr(layer, "mlp", None)) is MLP
        and len(outline.GATE_UP) == 2
        for layer in outline.layers
    )
    if count > 1 and not is_plain:
        raise ValueError(
            f"tensor_parallel_size={count} is not supported for {type(outline).__name__}: it must "
            "be an architecture of dense layers with projections for each of q, k, v, gate and up"
        )


def take_share(tensor: torch.Tensor, shape: torch.Size | None, shard: Shard) -> torch.Tensor:
    """What a place of this shape takes of a tensor that may be larger by a factor, in one
    dimension."""
    if shape is None or len(shape) != tensor.dim():
        return tensor
    for dimension, size in enumerate(shape):
        if tensor.shape[dimension] == size * shard.count != size:
            return tensor.narrow(dimension, size * shard.index, size)
    return tensor


def summed_linears(layer: Any) -> Iterator[tuple[Any, str]]:
    """Owner and attribute name of the linears whose outputs are summands of the whole's."""
    yield layer.attention, "out_proj"
    yield layer.mlp, "down_proj"


def drop_summed_biases(model: Any) -> None:
    """In all shares but the first: a bias is summed once."""
    for layer in model.layers:
        for owner, name in summed_linears(layer):
            bias = getattr(owner, name).bias
            if bias is not None:
                bias.zero_()
