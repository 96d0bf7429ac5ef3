"""Packing by itself: conversions value by value, and what it refuses. Images are test_image's."""

from __future__ import annotations

import pytest
import torch

from loraplex import native

TILE_RANKS, TILE_COLUMNS = 8, 64
ALL_BITS = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)


def pack(matrix: torch.Tensor, dtype: torch.dtype, scaling: float) -> torch.Tensor:
    """A matrix A [rank, columns] of whole tiles, through an image of one page."""
    rank, columns = matrix.shape
    page = torch.full((1, matrix.numel() * dtype.itemsize), 0xFF, dtype=torch.uint8)
    assert native.pack_lora(page, dtype.itemsize, [matrix], [0], [False], [scaling]) == -1
    tiles = page.view(dtype).view(rank // TILE_RANKS, -1, TILE_RANKS, TILE_COLUMNS)
    return tiles.swapaxes(1, 2).reshape(rank, columns)


@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaling", [1.0, 0.3])
def test_every_16_bit_value(source, dtype, scaling):
    values = ALL_BITS.view(source)
    expected = values.float() * torch.tensor(scaling)
    is_served = torch.isfinite(expected.to(dtype))
    values = torch.where(is_served, values, torch.zeros((), dtype=source)).view(16, -1)
    expected = torch.where(is_served, expected, 0.0).view(16, -1)
    result = pack(values, dtype, scaling)
    assert torch.equal(result, expected.to(dtype))


def test_float32_is_rounded_to_the_nearest_and_ties_to_even():
    torch.manual_seed(0)
    bits = torch.randint(0, 0x7F7F0000, (64, 4096), dtype=torch.int32)
    bits[::2] = bits[::2] & ~0xFFFF | 0x8000  # In the middle between two values of bfloat16.
    values = bits.view(torch.float32)
    assert torch.equal(pack(values, torch.bfloat16, 1.0), values.to(torch.bfloat16))
    assert torch.equal(pack(values, torch.float32, 1.0), values)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3.4e38])
def test_the_first_matrix_that_is_not_finite_is_told(is_transposed, value):
    matrices = [torch.ones(16, 16) for _ in range(4)]
    matrices[2][11, 13] = value
    matrices[3][:] = float("nan")
    page = torch.zeros(1, 1 << 16, dtype=torch.uint8)
    sides, scalings = [is_transposed] * 4, [2.0] * 4
    assert native.pack_lora(page, 2, matrices, [0, 2, 4, 6], sides, scalings) == 2


def test_matrices_must_be_apart_and_inside_the_pages():
    page = torch.zeros(2, 4 * 1024, dtype=torch.uint8)  # Four tiles of bfloat16 in each.
    matrices = [torch.ones(8, 128), torch.ones(8, 64)]
    assert native.pack_lora(page, 2, matrices, [3, 7], [False] * 2, [1.0] * 2) == -1
    for first_tiles in ([3, 4], [3, 8], [-1, 4], [4, 2]):
        with pytest.raises(ValueError, match=r"first_tiles\[[01]\] is "):
            native.pack_lora(page, 2, matrices, first_tiles, [False] * 2, [1.0] * 2)
    with pytest.raises(ValueError, match=r"matrices\[0\] must be of type float32, float16 or"):
        native.pack_lora(page, 2, [torch.ones(8, 64).double()], [0], [False], [1.0])
    with pytest.raises(ValueError, match="as many as matrices"):
        native.pack_lora(page, 2, matrices, [3], [False] * 2, [1.0] * 2)
