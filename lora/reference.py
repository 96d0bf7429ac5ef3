"""Twins of lora/ops.py in plain torch: slow, for any device; what the kernels are compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

Tensor = torch.Tensor

TILE_RANKS = 8
TILE_COLUMNS = 64


def shrink(
    v: Tensor,
    x: Tensor,
    pool: Tensor,
    segment_indptr: Tensor,
    page_tables: Tensor,
    layer: int,
    modules: Sequence[int],
    num_modules: int,
) -> None:
    """Semantics: v[t, m, :rank] = A[m, expert] @ x[t]."""
    for expert, rows, pages in _segments(segment_indptr, page_tables):
        for m, module in enumerate(modules):
            a_tile, _, rank = _header_entry(pool[pages[0]], layer * num_modules + module)
            if rank > 0:
                a = _matrix(pool.view(x.dtype), pages, a_tile, expert, rank, x.shape[1])
                v[rows, m, :rank] = (x[rows].to(v.dtype) @ a.to(v.dtype).T).to(v.dtype)


def expand(
    y: Tensor,
    v: Tensor,
    pool: Tensor,
    segment_indptr: Tensor,
    page_tables: Tensor,
    layer: int,
    modules: Sequence[int],
    num_modules: int,
    offsets: Sequence[int],
) -> None:
    """Semantics: y[t, offsets[m] : offsets[m + 1]] += B[m, expert] @ v[t, m, :rank]."""
    for expert, rows, pages in _segments(segment_indptr, page_tables):
        for m, module in enumerate(modules):
            _, b_tile, rank = _header_entry(pool[pages[0]], layer * num_modules + module)
            if rank > 0:
                columns = slice(offsets[m], offsets[m + 1])
                width = offsets[m + 1] - offsets[m]
                b = _matrix(pool.view(y.dtype), pages, b_tile, expert, rank, width)
                total = y[rows, columns].to(v.dtype) + v[rows, m, :rank] @ b.to(v.dtype)
                y[rows, columns] = total.to(y.dtype)


def _segments(segment_indptr: Tensor, page_tables: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
    """Expert, rows and pages of the segments that have rows."""
    for expert, bounds in enumerate(torch.atleast_2d(segment_indptr).tolist()):
        for begin, end, pages in zip(bounds, bounds[1:], page_tables.long(), strict=False):
            if begin < end:
                yield expert, slice(begin, end), pages


def _header_entry(page: Tensor, index: int) -> list[int]:
    """(a_tile, b_tile, rank) of a module of a layer."""
    entry: list[int] = page[16 * index : 16 * index + 12].view(torch.int32).tolist()
    return entry


def _matrix(
    pool: Tensor, pages: Tensor, first_tile: int, expert: int, rank: int, columns: int
) -> Tensor:
    """An expert's matrix [rank, columns] out of its tiles; pool [num_pages, elements of a page]."""
    rank_tiles, column_tiles = -(-rank // TILE_RANKS), -(-columns // TILE_COLUMNS)
    tiles_per_page = pool.shape[1] // (TILE_RANKS * TILE_COLUMNS)
    whole_tiles = pool[:, : tiles_per_page * TILE_RANKS * TILE_COLUMNS].unflatten(
        1, (tiles_per_page, TILE_RANKS, TILE_COLUMNS)
    )
    index = torch.arange(rank_tiles * column_tiles, device=pool.device)
    index += first_tile + expert * len(index)
    tiles = whole_tiles[pages[index // tiles_per_page], index % tiles_per_page]
    grid = tiles.view(rank_tiles, column_tiles, TILE_RANKS, TILE_COLUMNS).transpose(1, 2)
    return grid.reshape(rank_tiles * TILE_RANKS, -1)[:rank, :columns]
