"""The packed form of an adapter: tiles in pages, as the kernels read them. Knows no files.

A tile is [TILE_RANKS, TILE_COLUMNS] elements of the model's dtype, row-major. Tile t lives in page
t // tiles_per_page of the image, at byte (t % tiles_per_page) * tile_bytes: a tile never crosses a
page, and what is left at a page's end stays unused. The first tiles hold the header, int32
[num_layers, num_modules, 4] = (a_tile, b_tile, rank, 0); rank 0: the module has no adapter. A
[rank, in_features] and B transposed [rank, out_features] are each rows of tiles from their first
tile on, zero padded. Layers follow one another, as the forward pass goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from loraplex.lora.loader import AdapterWeights, Place
from loraplex.lora.spec import BaseModelSpec

TILE_RANKS = 8
TILE_COLUMNS = 64
TILE_ELEMENTS = TILE_RANKS * TILE_COLUMNS
HEADER_FIELDS = 4


@dataclass(frozen=True)
class ImageLayout:
    """Where everything is in an image."""

    header: npt.NDArray[np.int32]  # [num_layers, num_modules, HEADER_FIELDS]
    num_tiles: int
    tiles_per_page: int
    num_pages: int


@dataclass(frozen=True)
class AdapterImage:
    """An adapter as it goes into the pool."""

    buffer: torch.Tensor  # uint8 [num_pages * page_bytes], pinned where there is CUDA
    num_pages: int
    max_rank: int
    module_mask: int
    """Bit m is set if module m is targeted in any layer."""
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.buffer.numel()

    @property
    def pages(self) -> torch.Tensor:
        """The buffer as uint8 [num_pages, page_bytes]."""
        return self.buffer.view(self.num_pages, -1)


def layout_image(
    ranks: Mapping[Place, int], spec: BaseModelSpec, page_bytes: int, itemsize: int
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
        rank_tiles = -(-rank // TILE_RANKS)
        a_tile = num_tiles
        b_tile = a_tile + rank_tiles * -(-module.in_features // TILE_COLUMNS)
        num_tiles = b_tile + rank_tiles * -(-module.out_features // TILE_COLUMNS)
        header[layer, module_id, :3] = a_tile, b_tile, rank
    return ImageLayout(header, num_tiles, tiles_per_page, -(-num_tiles // tiles_per_page))


def image_num_pages(
    ranks: Mapping[Place, int], spec: BaseModelSpec, page_bytes: int, itemsize: int
) -> int:
    """Pages of the image of an adapter with these ranks."""
    return layout_image(ranks, spec, page_bytes, itemsize).num_pages


def pack_image(weights: AdapterWeights, spec: BaseModelSpec, page_bytes: int) -> AdapterImage:
    """Pack an adapter. The buffer is in pinned memory where there is CUDA."""
    # In numpy, which computes in the calling thread: torch would hand the work to OpenMP threads
    # that fight with those of the model's forward pass.
    ranks, dtype = weights.ranks, weights.dtype
    layout = layout_image(ranks, spec, page_bytes, dtype.itemsize)
    buffer = torch.empty(
        layout.num_pages * page_bytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available()
    )
    pages = buffer.numpy().reshape(layout.num_pages, page_bytes)
    pages.fill(0)
    pages[0, : layout.header.nbytes] = layout.header.view(np.uint8).reshape(-1)
    slots = _tile_slots(pages, layout, dtype)
    for (module_id, _rank), layers in _group_by_shape(ranks).items():
        places = [(layer, module_id) for layer in layers]
        a = np.stack([_bits(weights.a[place]) for place in places])
        b = np.stack([_bits(weights.b[place]) for place in places]).transpose(0, 2, 1)
        for field, matrices in enumerate((a, b)):
            tiles = _to_tiles(matrices)
            numbers = layout.header[layers, module_id, field, None] + np.arange(tiles.shape[1])
            slots[np.divmod(numbers, layout.tiles_per_page)] = tiles
    module_mask = sum(1 << module_id for module_id in {module_id for _, module_id in ranks})
    return AdapterImage(buffer, layout.num_pages, max(ranks.values()), module_mask, dtype)


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
        a_tile, b_tile, rank, _ = header[layer, module_id].tolist()
        module = spec.modules[module_id]
        a = _from_tiles(tiles[a_tile:], rank, module.in_features)
        b = _from_tiles(tiles[b_tile:], rank, module.out_features)
        weights.a[layer, module_id] = torch.from_numpy(a).view(image.dtype)
        weights.b[layer, module_id] = torch.from_numpy(b.T.copy()).view(image.dtype)
    return weights


def _group_by_shape(ranks: Mapping[Place, int]) -> dict[tuple[int, int], list[int]]:
    """Layers by (module id, rank): their matrices have one shape, and are packed in one go."""
    groups: dict[tuple[int, int], list[int]] = {}
    for (layer, module_id), rank in ranks.items():
        groups.setdefault((module_id, rank), []).append(layer)
    return groups


def _bits_dtype(dtype: torch.dtype) -> torch.dtype:
    """An integer of this size: numpy has no bfloat16, and nothing is computed here."""
    return {2: torch.int16, 4: torch.int32}[dtype.itemsize]


def _bits(tensor: torch.Tensor) -> npt.NDArray[Any]:
    return tensor.view(_bits_dtype(tensor.dtype)).numpy()


def _tile_slots(
    pages: npt.NDArray[np.uint8], layout: ImageLayout, dtype: torch.dtype
) -> npt.NDArray[Any]:
    """Where tiles go in these pages: a view [num_pages, tiles_per_page, TILE_ELEMENTS]."""
    used = pages[:, : layout.tiles_per_page * TILE_ELEMENTS * dtype.itemsize]
    shape = layout.num_pages, layout.tiles_per_page, TILE_ELEMENTS
    return used.view(f"i{dtype.itemsize}").reshape(shape)


def _to_tiles(matrices: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """[n, rank, columns] to the tiles of each: [n, num_tiles, TILE_ELEMENTS]."""
    num_matrices, rank, columns = matrices.shape
    rank_tiles, column_tiles = -(-rank // TILE_RANKS), -(-columns // TILE_COLUMNS)
    padding = (0, rank_tiles * TILE_RANKS - rank), (0, column_tiles * TILE_COLUMNS - columns)
    blocks = np.pad(matrices, ((0, 0), *padding)).reshape(
        num_matrices, rank_tiles, TILE_RANKS, column_tiles, TILE_COLUMNS
    )
    return blocks.swapaxes(2, 3).reshape(num_matrices, -1, TILE_ELEMENTS)


def _from_tiles(tiles: npt.NDArray[Any], rank: int, columns: int) -> npt.NDArray[Any]:
    """The matrix [rank, columns] whose tiles are the first of these."""
    rank_tiles, column_tiles = -(-rank // TILE_RANKS), -(-columns // TILE_COLUMNS)
    blocks = tiles[: rank_tiles * column_tiles].reshape(
        rank_tiles, column_tiles, TILE_RANKS, TILE_COLUMNS
    )
    matrix = blocks.swapaxes(1, 2).reshape(rank_tiles * TILE_RANKS, -1)
    return matrix[:rank, :columns].copy()
