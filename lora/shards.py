"""Adapters for a model whose linears are divided among processes.

Of a linear that has some of the outputs in each process, B is divided and A is whole; of one that
has some of the inputs, A is divided and B is whole, since the products are summed. Gains are of the
outputs, and so are offsets, but one process alone adds to a sum. Every process has a share of each
expert, and the whole of a part in the embedding or the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from loraplex.lora.image import AdapterImage, AdapterWeights, pack_image
from loraplex.lora.page_memory import Allocate, allocate_pages
from loraplex.lora.spec import ONE_SECTION, BaseModelSpec, Section, parts_of_share


def sharded_spec(whole: BaseModelSpec, shard: BaseModelSpec, num_shards: int) -> BaseModelSpec:
    """What adapters of a divided model may target."""
    return replace(whole, shard=shard, num_shards=num_shards)


def pack_shards(
    weights: AdapterWeights,
    spec: BaseModelSpec,
    page_bytes: int,
    allocate: Allocate = allocate_pages,
) -> AdapterImage:
    """One image with the pages of all shares; spec: of the whole model, which has a `shard`."""
    assert spec.shard is not None
    images = [
        pack_image(_shard(weights, spec, spec.shard, index), spec.shard, page_bytes)
        for index in range(spec.num_shards)
    ]
    buffer = allocate(sum(image.num_bytes for image in images))
    torch.cat([image.buffer for image in images], out=buffer)
    return replace(images[0], buffer=buffer)


def _shard(
    weights: AdapterWeights, whole: BaseModelSpec, shard: BaseModelSpec, index: int
) -> AdapterWeights:
    a, b, count = dict(weights.a), dict(weights.b), whole.num_shards
    gains, offsets = dict(weights.gains), dict(weights.offsets)
    for place in weights.a:
        module, share = whole.modules[place[1]], shard.modules[place[1]]
        if share.in_features < module.in_features:
            a[place] = _take_part(a[place], -1, ONE_SECTION, index, count)
            if place in offsets and index > 0:
                offsets[place] = torch.zeros_like(offsets[place])
        if share.out_features < module.out_features:
            b[place] = _take_part(b[place], -2, share.sections, index, count)
            for vectors in (gains, offsets):
                if place in vectors:
                    vectors[place] = _take_part(vectors[place], 0, share.sections, index, count)
    return replace(weights, a=a, b=b, gains=gains, offsets=offsets)


def _take_part(
    matrix: torch.Tensor, dimension: int, sections: Sequence[Section], index: int, count: int
) -> torch.Tensor:
    parts = parts_of_share(matrix.shape[dimension], sections, index, count)
    return torch.cat([matrix.narrow(dimension, *part) for part in parts], dimension)
