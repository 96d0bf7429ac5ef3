"""Products with weights of 4 and 8 bits in groups, and those weights in full, against a twin."""

from __future__ import annotations

import pytest
import torch

from loraplex import native
from loraplex.engine.models.quantization.codes import FLOAT8, FP4, INT4, INT8, NF4, Code
from loraplex.engine.models.quantization.grouped import GroupedMatrix
from loraplex.engine.models.quantization.grouped_kernels import CpuGrouped

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7}


def make_matrix(
    code: Code, dtype: torch.dtype, out_features: int, in_features: int, group_size: int
) -> GroupedMatrix:
    generator = torch.Generator().manual_seed(out_features + in_features)
    values = torch.randint(2**code.bits, (out_features, in_features), generator=generator).byte()
    if code is FLOAT8:
        values[values & 127 == 127] = 0  # NaN
    shape = out_features, in_features // group_size
    scales = torch.rand(shape, generator=generator) / code.table.nan_to_num().max()
    middles = torch.randn(shape, generator=generator).to(dtype).float() if code is INT4 else None
    return GroupedMatrix(code, values, scales.to(dtype).float(), dtype, middles)


def expand_twin(matrix: GroupedMatrix) -> torch.Tensor:
    decoded = matrix.code.table.double()[matrix.values.int()]
    groups = decoded.unflatten(1, (matrix.scales.shape[1], -1))
    middles = matrix.all_middles().double().unsqueeze(-1)
    return (groups * matrix.scales.double().unsqueeze(-1) + middles).flatten(1)


@pytest.mark.parametrize("code", [INT4, NF4, FP4, INT8, FLOAT8], ids=lambda code: code.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(1, 32, 32), (7, 192, 64), (33, 256, 256)])
def test_products(isa, one_thread, code, dtype, sizes):
    if code.bits == 8:
        sizes = *sizes[:2], sizes[2] // 2
    matrix = make_matrix(code, dtype, *sizes)
    assert CpuGrouped.serves(matrix)
    multiply, weight = CpuGrouped(matrix), expand_twin(matrix)
    for num_rows in (1, 3, 8, 13, CpuGrouped.MAX_ROWS + 1):
        x = torch.randn(num_rows, sizes[1]).to(dtype)
        y = multiply(x)
        assert y.dtype == dtype
        # Beyond MAX_ROWS the weights are rounded, too.
        scale = (x.double().abs() @ weight.abs().T).max().item()
        torch.testing.assert_close(
            y.double(), x.double() @ weight.T, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale
        )


def test_what_is_packed_takes_no_more_memory():
    matrix = make_matrix(INT4, torch.bfloat16, 64, 256, 128)
    values, scales, middles, _, _ = CpuGrouped(matrix)._weights
    assert (values.nbytes, scales.nbytes, middles.nbytes) == (64 * 256 // 2, 64 * 2 * 2, 64 * 2 * 2)


@pytest.mark.parametrize(
    ("values", "scales", "message"),
    [
        ((4, 32), (4, 3), "groups whose size is a multiple of 32, got 3 groups of 64 inputs"),
        ((4, 32), (5, 1), r"scales must have shape \[4, \*\], got \[5, 1\]"),
    ],
)
def test_arguments_that_do_not_fit_are_named(values, scales, message):
    arguments = torch.zeros(values, dtype=torch.uint8), torch.zeros(scales), None, NF4.table, False
    with pytest.raises(ValueError, match=message):
        native.grouped_linear(torch.zeros(1, 4), torch.zeros(1, 64), *arguments)
