"""The products of few rows on Hopper GPUs against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from loraplex.engine.models.streamed_linear import MAX_ROWS, StreamedLinear, streamed_linear

Tensor = torch.Tensor

# (out_features, in_features): Llama-3-8B's and the embedded model's, and what fills no tile.
SHAPES = [(6144, 4096), (4096, 14336), (49152, 576), (1536, 576), (1000, 200), (72, 72), (8, 64)]


def relative_error(result: Tensor, reference: Tensor) -> float:
    return float((result.double() - reference).norm() / reference.norm())


def make(out_features: int, in_features: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    sizes = (rows, in_features), (out_features, in_features), (out_features,)
    x, weight, bias = (torch.randn(*size, device="cuda").bfloat16() for size in sizes)
    return x, weight, bias


def serve(weight: Tensor) -> StreamedLinear:
    linear = streamed_linear(weight)
    if linear is None:
        pytest.skip(f"no kernel for capability {torch.cuda.get_device_capability()}")
    return linear


@pytest.mark.parametrize("out_features, in_features", SHAPES)
@pytest.mark.parametrize("rows", [1, 7, 16, 17, 48, MAX_ROWS])
def test_rounds_as_little_as_cublas(out_features: int, in_features: int, rows: int) -> None:
    x, weight, bias = make(out_features, in_features, rows)
    for added in (None, bias):
        reference = F.linear(x.double(), weight.double(), None if added is None else added.double())
        error = relative_error(serve(weight)(x, weight, added), reference)
        assert error <= 1.05 * relative_error(F.linear(x, weight, added), reference)


@pytest.mark.parametrize("out_features, in_features", SHAPES)
def test_a_row_depends_on_no_other_and_on_no_chance(out_features: int, in_features: int) -> None:
    x, weight, _ = make(out_features, in_features, MAX_ROWS)
    linear = serve(weight)
    together = linear(x, weight, None)
    alone = torch.cat([linear(x[i : i + 1], weight, None) for i in range(MAX_ROWS)])
    torch.testing.assert_close(alone, together, rtol=0, atol=0)
    for _ in range(20):
        torch.testing.assert_close(linear(x, weight, None), together, rtol=0, atol=0)


def test_rows_that_are_a_part_of_wider_ones() -> None:
    x, weight, _ = make(1536, 576, 9)
    wide = torch.randn(9, 1024, device="cuda").bfloat16()
    wide[:, 64 : 64 + 576] = x
    linear = serve(weight)
    torch.testing.assert_close(
        linear(wide[:, 64 : 64 + 576], weight, None), linear(x, weight, None), rtol=0, atol=0
    )
