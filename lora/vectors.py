"""Gains and offsets: what some kinds of adapters do to a linear besides adding B A x.

With y = W x + b the base model's output, such an adapter's is y (1 + gain) + offset + B A x:
 - DoRA (Liu et al. 2024, arXiv 2402.09353) gives each row of W + s B A the length m: with
   g = m / |W + s B A| the gain is g - 1, B is s g B, and since b is not scaled, the offset takes
   b (g - 1) off again.
 - A bias that was trained with the adapter replaces b: the offset is the difference.
 - A bias of B (lora_bias) is an offset, times s.
What is said here of loading is done once, when an adapter is read. In a step, `VectorBatch` wraps
the batch's adapters if any of them has such vectors; without it nothing of this is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from operator import or_

import numpy as np
import numpy.typing as npt
import torch

from loraplex.lora.experts import Routing
from loraplex.lora.fusion import Part
from loraplex.lora.image import (
    HEADER_FIELDS,
    TILE_ELEMENTS,
    AdapterWeights,
    num_vector_tiles,
)
from loraplex.lora.layers import LoRABatch, WithLoRA
from loraplex.lora.spec import AdapterError, AdapterTraits, BaseModelSpec

Tensor = torch.Tensor
CHUNK_ROWS = 256
Int32Array = npt.NDArray[np.int32]


def add_vectors(
    weights: AdapterWeights, part: Part, tensors: Callable[[str], Tensor], spec: BaseModelSpec
) -> None:
    """Work a module's magnitude and biases, if it has any, into the weights that are in place."""
    names, place = part.module.vectors, part.place
    if not names:
        return
    linears = spec.linears
    if linears is None:
        raise AdapterError(
            f"tensor {next(iter(names.values()))!r} depends on the base model's weights, which "
            "are not here"
        )

    def vector(kind: str) -> Tensor:
        return tensors(names[kind])[part.source].float()

    scaling, target = part.module.scaling, part.target
    base_bias = linears.bias(*place)[target]
    offset = torch.zeros_like(base_bias)
    scale = torch.ones_like(base_bias)
    if "bias" in names:
        offset += vector("bias") - base_bias
    if "lora_bias" in names:
        offset += vector("lora_bias") * scaling
    if "magnitude" in names:
        a = tensors(part.module.tensor_a).double()
        b = tensors(part.module.tensor_b)[part.source].double() * scaling
        projected = linears.multiply(*place, a.float())[:, target].double()
        squares = linears.squared_norms(*place)[target].double()
        squares += 2 * (b * projected.T).sum(1) + ((b @ (a @ a.T)) * b).sum(1)
        scale = (vector("magnitude") / squares.clamp(min=0).sqrt()).float()
        offset -= (scale - 1) * base_bias
        rows = weights.b[place].to(torch.float32, copy=True)
        rows[target] *= scale[:, None]
        weights.b[place] = rows
    out_features = spec.modules[place[1]].out_features
    gains = weights.gains.setdefault(place, torch.zeros(out_features))
    offsets = weights.offsets.setdefault(place, torch.zeros(out_features))
    gains[target], offsets[target] = scale - 1, offset


class VectorBatch:
    """A step's adapters, of which some have gains and offsets. See LoRABatch.

    Plain torch, for any device: a few small operations for each module of a linear.
    """

    def __init__(
        self,
        plain: LoRABatch,
        pool: Tensor,
        itemsize: int,
        spec: BaseModelSpec,
        segment_indptr: Int32Array,
        page_tables: Int32Array,
        traits: Sequence[AdapterTraits],
    ) -> None:
        """pool: uint8 [num_pages, page_bytes], with images of elements of itemsize bytes.

        segment_indptr, page_tables, traits: of all segments.
        """
        self._plain = plain
        segments = [i for i, t in enumerate(traits) if t.vector_mask]
        self._mask = reduce(or_, (t.vector_mask for t in traits))
        self._tile_bytes = TILE_ELEMENTS * itemsize
        self._tiles_per_page = pool.shape[1] // self._tile_bytes
        used = pool[:, : self._tiles_per_page * self._tile_bytes]
        self._tiles = used.unflatten(1, (self._tiles_per_page, self._tile_bytes))
        rows = [np.arange(*segment_indptr[i : i + 2], dtype=np.int64) for i in segments]
        index = np.repeat(np.arange(len(segments)), [len(r) for r in rows])
        # (rows, indices of their vectors), of so few rows that the vectors of each may be laid out.
        self._chunks = [
            tuple(torch.from_numpy(part[begin : begin + CHUNK_ROWS]).to(pool.device)
                  for part in (np.concatenate(rows), index))
            for begin in range(0, len(index), CHUNK_ROWS)
        ]  # fmt: skip
        self._page_tables = torch.from_numpy(page_tables[segments]).long().to(pool.device)
        shape = spec.num_layers, spec.num_modules, HEADER_FIELDS
        header = pool[self._page_tables[:, 0], : 4 * int(np.prod(shape))]
        self._places: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._first_tiles = header.view(torch.int32).view(-1, *shape)[..., 3].long()

    def add(self, y: Tensor, x: Tensor, linear: WithLoRA, routing: Routing | None = None) -> None:
        for index, module in enumerate(linear.modules):
            if self._mask >> module & 1:
                columns = y[:, linear.offsets[index] : linear.offsets[index + 1]]
                self._scale_and_shift(columns, linear.layer, module)
        self._plain.add(y, x, linear, routing)

    def _scale_and_shift(self, y: Tensor, layer: int, module: int) -> None:
        """y [num_tokens, out_features], in place, of one module."""
        if module not in self._places:
            self._places[module] = self._find(module, y.shape[1])
        pages, slots, is_missing = self._places[module]
        found = self._tiles[pages[:, layer], slots[:, layer]]
        vectors = found.view(torch.float32).view(len(found), 2, -1)[..., : y.shape[1]]
        vectors = vectors.masked_fill(is_missing[:, layer, :, None], 0)
        vectors[:, 0] += 1
        for rows, index in self._chunks:
            gain, offset = vectors[index].unbind(1)
            y[rows] = torch.addcmul(offset, y[rows].float(), gain).to(y.dtype)

    def _find(self, module: int, out_features: int) -> tuple[Tensor, Tensor, Tensor]:
        """Where a module's vectors are, of all layers at once: pages and slots of their tiles,
        [segments, num_layers, tiles], and whether there are none, [segments, num_layers, 1]."""
        first = self._first_tiles[:, :, module, None]
        num_tiles = 2 * num_vector_tiles(out_features, self._tile_bytes)
        tiles = first + torch.arange(num_tiles, device=first.device)
        # Where an adapter has no vectors, whatever is read is dropped.
        page_index = (tiles // self._tiles_per_page).clamp(max=self._page_tables.shape[1] - 1)
        pages = self._page_tables.gather(1, page_index.flatten(1)).view_as(tiles)
        return pages, tiles % self._tiles_per_page, first == 0
