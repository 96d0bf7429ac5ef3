"""The packed form of an adapter: tiles in pages, as the kernels read them. Knows no files.

A tile is [TILE_RANKS, TILE_COLUMNS] elements of the model's dtype, row-major. Tile t lives in page
t // tiles_per_page of the image, at byte (t % tiles_per_page) * tile_bytes: a tile never crosses a
page, and what is left at a page's end stays unused. The first tiles hold the header, int32
[num_layers, num_modules, 4] = (a_tile, b_tile, rank, vector_tile); rank 0: the module has no
adapter. A [rank, in_features] and B transposed [rank, out_features] are each rows of tiles from
their first tile on, zero padded; where a module is that of several experts, all their A follow one
another, and all their B. vector_tile 0: that is all of it. Else two vectors of float32
[out_features] begin there, its gain and its offset (lora/vectors.py), each in whole tiles, zero
padded. Layers follow one another, as the forward pass goes. Behind them may lie matrices for the
embedding and the head, where the adapter's traits say: A and B as above, or one in place of the
base model's, [num_tokens, hidden_size], laid out like an A.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from loraplex import native
from loraplex.lora.page_memory import Allocate, allocate_pages
from loraplex.lora.spec import AdapterError, AdapterTraits, BaseModelSpec, EndTiles

TILE_RANKS = 8
TILE_COLUMNS = 64
TILE_ELEMENTS = TILE_RANKS * TILE_COLUMNS
HEADER_FIELDS = 4

Place = tuple[int, int]
"""(layer, module id)"""


@dataclass(frozen=True)
class EndWeights:
    """An adapter's matrices for the embedding or the head, as they are in its file."""

    a: torch.Tensor  # [rank, in_features], or without b the matrix itself, [num_tokens, hidden]
    b: torch.Tensor | None  # [out_features, rank]
    scaling: float = 1.0


@dataclass(frozen=True)
class AdapterWeights:
    """An adapter's matrices by place, float32, float16 or bfloat16."""

    a: dict[Place, torch.Tensor]  # [rank, in_features], of experts [num_experts, ...]
    b: dict[Place, torch.Tensor]  # [out_features, rank], of experts [num_experts, ...]
    dtype: torch.dtype
    """Of the image: the model's."""
    scalings: dict[Place, float] = field(default_factory=dict)
    """What B is to be multiplied with, where that is not 1."""
    gains: dict[Place, torch.Tensor] = field(default_factory=dict)
    """float32 [out_features], where a module has one: its output is multiplied by 1 + this."""
    offsets: dict[Place, torch.Tensor] = field(default_factory=dict)
    """float32 [out_features], for the same modules: what is added to that."""
    embedding: EndWeights | None = None
    head: EndWeights | None = None
    invocation_token_ids: tuple[int, ...] = ()
    """See AdapterTraits."""

    @property
    def ranks(self) -> dict[Place, int]:
        return {place: a.shape[-2] for place, a in self.a.items()}


@dataclass(frozen=True)
class ImageLayout:
    """Where everything is in an image."""

    header: npt.NDArray[np.int32]  # [num_layers, num_modules, HEADER_FIELDS]
    num_tiles: int
    tiles_per_page: int
    num_pages: int


@dataclass(frozen=True)
class AdapterImage:
    """An adapter as it goes into the pool, or into those of all shares of the model."""

    buffer: torch.Tensor  # uint8 [shares * num_pages * page_bytes]
    num_pages: int
    page_bytes: int
    traits: AdapterTraits
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.buffer.numel()

    @property
    def pages(self) -> torch.Tensor:
        """Those of the first share, uint8 [num_pages, page_bytes]."""
        return self.pages_of(0)

    def pages_of(self, share: int) -> torch.Tensor:
        """uint8 [num_pages, page_bytes]."""
        return self.buffer.view(-1, self.num_pages, self.page_bytes)[share]


def layout_image(
    ranks: Mapping[Place, int],
    spec: BaseModelSpec,
    page_bytes: int,
    itemsize: int,
    with_vectors: Collection[Place] = (),
) -> ImageLayout:
    """Lay out an image for these ranks. Raises ValueError if a page cannot hold the header."""
    tile_bytes = TILE_ELEMENTS * itemsize
    tiles_per_page = page_bytes // tile_bytes
    header = np.zeros((spec.num_layers, spec.num_modules, HEADER_FIELDS), np.int32)
    num_tiles = -(-header.nbytes // tile_bytes)
    if num_tiles > tiles_per_page:
        raise ValueError(
            f"page_bytes={page_bytes} is not allowed: an adapter's header takes {header.nbytes} "
            f"bytes, {num_tiles} tiles of {tile_bytes}, and must fit in one page; raise block_size"
        )
    for layer, module_id in sorted(ranks):
        module, rank = spec.modules[module_id], ranks[layer, module_id]
        a_tile = num_tiles
        b_tile = a_tile + module.num_experts * _num_tiles(rank, module.in_features)
        num_tiles = b_tile + module.num_experts * _num_tiles(rank, module.out_features)
        header[layer, module_id, :3] = a_tile, b_tile, rank
        if (layer, module_id) in with_vectors:
            header[layer, module_id, 3] = num_tiles
            num_tiles += 2 * num_vector_tiles(module.out_features, tile_bytes)
    return ImageLayout(header, num_tiles, tiles_per_page, -(-num_tiles // tiles_per_page))


def _num_tiles(rows: int, columns: int) -> int:
    return -(-rows // TILE_RANKS) * -(-columns // TILE_COLUMNS)


def num_vector_tiles(out_features: int, tile_bytes: int) -> int:
    """Tiles of a gain or an offset."""
    return -(-out_features * 4 // tile_bytes)


def image_num_pages(
    ranks: Mapping[Place, int], spec: BaseModelSpec, page_bytes: int, itemsize: int
) -> int:
    """Pages of the image of an adapter with these ranks."""
    return layout_image(ranks, spec, page_bytes, itemsize).num_pages


def pack_image(
    weights: AdapterWeights,
    spec: BaseModelSpec,
    page_bytes: int,
    allocate: Allocate = allocate_pages,
) -> AdapterImage:
    """Pack an adapter, its values times their scalings rounded once.

    Raises AdapterError if a value is not finite, in the weights or as the image's dtype has it.
    """
    ranks, dtype = weights.ranks, weights.dtype
    layout = layout_image(ranks, spec, page_bytes, dtype.itemsize, weights.gains)
    matrices = list(_matrices_of_layers(weights, layout))
    num_tiles, ends = layout.num_tiles, dict[str, EndTiles]()
    for name, end in (("embedding", weights.embedding), ("head", weights.head)):
        if end is not None:
            ends[name] = EndTiles(num_tiles, 0, end.a.shape[0])
            matrices.append(_Matrix(f"of the {name}", end.a, num_tiles))
            num_tiles += _num_tiles(*end.a.shape)
        if end is not None and end.b is not None:
            ends[name] = replace(ends[name], b_tile=num_tiles)
            matrices.append(_Matrix(f"of the {name}", end.b, num_tiles, True, end.scaling))
            num_tiles += _num_tiles(*end.b.T.shape)
    num_pages = -(-num_tiles // layout.tiles_per_page)
    layout = replace(layout, num_tiles=num_tiles, num_pages=num_pages)
    buffer = allocate(num_pages * page_bytes)
    pages = buffer.view(num_pages, page_bytes)
    # One call, in which others may hold the interpreter's lock: packing takes milliseconds.
    index = native.pack_lora(
        pages,
        dtype.itemsize,
        [matrix.values for matrix in matrices],
        [matrix.first_tile for matrix in matrices],
        [matrix.is_transposed for matrix in matrices],
        [matrix.scaling for matrix in matrices],
    )
    if index >= 0:
        where, scaling = matrices[index].where, matrices[index].scaling
        if isinstance(where, tuple):
            side = "AB"[matrices[index].is_transposed]
            where = f"'base_model.model.{spec.module_path(*where)}.lora_{side}.weight'"
        raise AdapterError(
            f"tensor {where} is not allowed: it holds infinite or NaN values, or gets them as "
            f"{dtype} times the scaling {scaling:g}"
        )
    buffer[: layout.header.nbytes] = torch.from_numpy(layout.header.view(np.uint8).reshape(-1))
    _pack_vectors(weights, spec, layout, pages)
    traits = AdapterTraits(
        max_rank=max(ranks.values(), default=0),
        module_mask=_mask(ranks),
        vector_mask=_mask(weights.gains),
        invocation_token_ids=weights.invocation_token_ids,
        num_added_tokens=_num_added_tokens(weights, spec),
        **ends,
    )
    return AdapterImage(buffer, num_pages, page_bytes, traits, dtype)


def _num_added_tokens(weights: AdapterWeights, spec: BaseModelSpec) -> int:
    end = weights.embedding
    if end is None or end.b is not None or spec.embedding is None:
        return 0
    return max(0, end.a.shape[0] - spec.embedding.in_features)


class _Matrix(NamedTuple):
    """What goes into an image, from a tile on."""

    where: Place | str
    values: torch.Tensor
    first_tile: int
    is_transposed: bool = False
    scaling: float = 1.0


def _matrices_of_layers(weights: AdapterWeights, layout: ImageLayout) -> Iterator[_Matrix]:
    for place in sorted(weights.a):
        a_tile, b_tile = layout.header[place][:2].tolist()
        scaling = weights.scalings.get(place, 1.0)
        for a in _of_each_expert(weights.a[place]):
            yield _Matrix(place, a, a_tile)
            a_tile += _num_tiles(*a.shape)
        for b in _of_each_expert(weights.b[place]):
            yield _Matrix(place, b, b_tile, True, scaling)
            b_tile += _num_tiles(*b.T.shape)


def _of_each_expert(matrices: torch.Tensor) -> Sequence[torch.Tensor]:
    return [matrices] if matrices.dim() == 2 else matrices.unbind()


def _mask(places: Collection[Place]) -> int:
    """Bits of the modules that are targeted."""
    return sum(1 << module_id for module_id in {module_id for _, module_id in places})


def _pack_vectors(
    weights: AdapterWeights, spec: BaseModelSpec, layout: ImageLayout, pages: torch.Tensor
) -> None:
    slots = _tile_slots(pages.numpy(), layout, weights.dtype)
    tile_bytes = TILE_ELEMENTS * weights.dtype.itemsize
    for place, gain in weights.gains.items():
        vectors = torch.stack([gain, weights.offsets[place]])
        if not vectors.isfinite().all():
            raise AdapterError(
                f"the magnitude or a bias of {spec.module_path(*place)} is not allowed: with the "
                "base model's weights it gives infinite or NaN values"
            )
        num_tiles = num_vector_tiles(len(gain), tile_bytes)
        padded = np.zeros((2, num_tiles * tile_bytes // 4), np.float32)
        padded[:, : len(gain)] = vectors.numpy()
        tiles = layout.header[*place, 3] + np.arange(2 * num_tiles)
        slots[tiles // layout.tiles_per_page, tiles % layout.tiles_per_page] = padded.view(
            slots.dtype
        ).reshape(2 * num_tiles, TILE_ELEMENTS)


def unpack_image(image: AdapterImage, spec: BaseModelSpec) -> AdapterWeights:
    """The inverse of pack_image, by the header alone, as a kernel reads it."""
    shape = spec.num_layers, spec.num_modules, HEADER_FIELDS
    pages = image.buffer.numpy().reshape(image.num_pages, -1)
    header = pages[0, : int(np.prod(shape)) * 4].view(np.int32).reshape(shape)
    tiles_per_page = pages.shape[1] // (TILE_ELEMENTS * image.dtype.itemsize)
    layout = ImageLayout(header, image.num_pages * tiles_per_page, tiles_per_page, image.num_pages)
    tiles = _tile_slots(pages, layout, image.dtype).reshape(-1, TILE_ELEMENTS)
    weights = AdapterWeights({}, {}, image.dtype)
    for layer, module_id in np.argwhere(header[..., 2]).tolist():
        a_tile, b_tile, rank, vector_tile = header[layer, module_id].tolist()
        module = spec.modules[module_id]
        a = _from_tiles(tiles[a_tile:], module.num_experts, rank, module.in_features)
        b = _from_tiles(tiles[b_tile:], module.num_experts, rank, module.out_features)
        weights.a[layer, module_id] = torch.from_numpy(a).view(image.dtype)
        weights.b[layer, module_id] = torch.from_numpy(b.swapaxes(-1, -2).copy()).view(image.dtype)
        if vector_tile:
            num_tiles = num_vector_tiles(module.out_features, tiles[0].nbytes)
            vectors = tiles[vector_tile : vector_tile + 2 * num_tiles].copy().view(np.float32)
            gain, offset = torch.from_numpy(vectors).view(2, -1)[:, : module.out_features]
            weights.gains[layer, module_id], weights.offsets[layer, module_id] = gain, offset
    return weights


def _tile_slots(
    pages: npt.NDArray[np.uint8], layout: ImageLayout, dtype: torch.dtype
) -> npt.NDArray[Any]:
    """Where tiles go in these pages: a view [num_pages, tiles_per_page, TILE_ELEMENTS]."""
    used = pages[:, : layout.tiles_per_page * TILE_ELEMENTS * dtype.itemsize]
    shape = layout.num_pages, layout.tiles_per_page, TILE_ELEMENTS
    return used.view(f"i{dtype.itemsize}").reshape(shape)


def _from_tiles(
    tiles: npt.NDArray[Any], num_experts: int, rank: int, columns: int
) -> npt.NDArray[Any]:
    """The matrix [rank, columns] whose tiles are the first of these; of several experts theirs,
    [num_experts, rank, columns]."""
    rank_tiles, column_tiles = -(-rank // TILE_RANKS), -(-columns // TILE_COLUMNS)
    blocks = tiles[: num_experts * rank_tiles * column_tiles].reshape(
        num_experts, rank_tiles, column_tiles, TILE_RANKS, TILE_COLUMNS
    )
    matrices = blocks.swapaxes(2, 3).reshape(num_experts, rank_tiles * TILE_RANKS, -1)
    matrices = matrices[:, :rank, :columns].copy()
    return matrices[0] if num_experts == 1 else matrices
