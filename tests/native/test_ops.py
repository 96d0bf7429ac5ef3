"""The models' row-wise operations against their twins in torch, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from loraplex.engine.models import ops

Tensor = torch.Tensor

DTYPES = [torch.float32, torch.bfloat16]
SIZES = [1, 15, 16, 37, 64, 576, 2048]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}


def rms_norm_twin(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.double(), (x.shape[-1],), weight.double(), eps)


def rope_twin(positions: Tensor, x: Tensor, cos_sin_cache: Tensor) -> Tensor:
    rotary_dim = cos_sin_cache.shape[1]
    cos, sin = cos_sin_cache.double()[positions].unsqueeze(1).chunk(2, -1)
    first, second = x.double()[..., :rotary_dim].chunk(2, -1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return torch.cat((rotated, x.double()[..., rotary_dim:]), -1)


def silu_and_mul_twin(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.double().chunk(2, -1)
    return F.silu(gate) * up


def gelu_tanh_and_mul_twin(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.double().chunk(2, -1)
    return F.gelu(gate, approximate="tanh") * up


def assert_close(result: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), exact, rtol=TOLERANCE[dtype], atol=1e-6)


@pytest.fixture(autouse=True)
def seed(one_thread: None) -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_rms_norm(isa: str, dtype: torch.dtype, size: int) -> None:
    x, weight = torch.randn(5, size).to(dtype), torch.randn(size).to(dtype)
    assert_close(ops.rms_norm(x, weight, 1e-5), rms_norm_twin(x, weight, 1e-5), dtype)


def test_rms_norm_adds_the_offset_to_the_weight(isa: str) -> None:
    x, weight = torch.randn(5, 100).bfloat16(), torch.randn(100).mul(0.01).bfloat16()
    exact = rms_norm_twin(x, weight.double() + 1, 1e-5)
    assert_close(ops.rms_norm(x, weight, 1e-5, 1.0), exact, x.dtype)
    residual = torch.zeros_like(x)
    ops.fused_add_rms_norm(x, residual, weight, 1e-5, 1.0)
    assert_close(x, exact, x.dtype)


def test_rms_norm_of_the_heads_of_a_view(isa: str) -> None:
    q = torch.randn(5, 9, 32).bfloat16()[:, 2:6]
    weight = torch.randn(32).bfloat16()
    assert_close(ops.rms_norm(q, weight, 1e-6), rms_norm_twin(q, weight, 1e-6), q.dtype)


def test_rms_norm_uses_eps(isa: str) -> None:
    x, weight = torch.full((1, 64), 1e-4), torch.ones(64)
    assert_close(ops.rms_norm(x, weight, 1e-2), rms_norm_twin(x, weight, 1e-2), x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_fused_add_rms_norm(isa: str, dtype: torch.dtype, size: int) -> None:
    x, residual = torch.randn(2, 5, size).to(dtype).unbind()
    weight = torch.randn(size).to(dtype)
    total = residual + x
    ops.fused_add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, total)
    assert_close(x, rms_norm_twin(total, weight, 1e-5), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(16, 16), (64, 64), (80, 80), (80, 32)])
def test_apply_rope(isa: str, dtype: torch.dtype, head_dim: int, rotary_dim: int) -> None:
    qkv = torch.randn(7, 8, head_dim).to(dtype)
    before = qkv.clone()
    q, k = qkv[:, :4], qkv[:, 4:6]
    positions = torch.tensor([0, 99, 3, 3, 50, 98, 1])
    angles = torch.rand(100, rotary_dim // 2) * 6
    cos_sin_cache = torch.cat((angles.cos(), angles.sin()), -1)
    ops.apply_rope(positions, q, k, cos_sin_cache)
    assert_close(q, rope_twin(positions, before[:, :4], cos_sin_cache), dtype)
    assert_close(k, rope_twin(positions, before[:, 4:6], cos_sin_cache), dtype)
    assert torch.equal(qkv[:, 6:], before[:, 6:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_silu_and_mul(isa: str, dtype: torch.dtype, size: int) -> None:
    gate_up = torch.randn(5, 2 * size).mul(20).to(dtype)
    assert_close(ops.silu_and_mul(gate_up), silu_and_mul_twin(gate_up), dtype)


def test_silu_and_mul_of_extremes(isa: str) -> None:
    gate = torch.tensor([[-1e30, -200.0, -88.0, -0.0, 0.0, 88.0, 200.0, 1e30]])
    result = ops.silu_and_mul(torch.cat((gate, torch.ones(1, 8)), -1))
    torch.testing.assert_close(result, F.silu(gate), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_gelu_tanh_and_mul(isa: str, dtype: torch.dtype, size: int) -> None:
    gate_up = torch.randn(5, 2 * size).mul(3).to(dtype)
    assert_close(ops.gelu_tanh_and_mul(gate_up), gelu_tanh_and_mul_twin(gate_up), dtype)


def test_gelu_tanh_and_mul_of_extremes(isa: str) -> None:
    gate = torch.tensor([[-1e30, -200.0, -9.0, -0.0, 0.0, 9.0, 200.0, 1e30]])
    result = ops.gelu_tanh_and_mul(torch.cat((gate, torch.ones(1, 8)), -1))
    exact = F.gelu(gate, approximate="tanh")
    torch.testing.assert_close(result, exact, rtol=1e-6, atol=1e-6)


def test_nan_stays_nan(isa: str) -> None:
    for dtype in DTYPES:
        x = torch.ones(1, 64, dtype=dtype)
        x[0, 5] = torch.nan
        assert ops.rms_norm(x, torch.ones(64, dtype=dtype), 1e-5).isnan().all()
        assert ops.silu_and_mul(x).isnan().sum() == 1
        assert ops.gelu_tanh_and_mul(x).isnan().sum() == 1


def test_rounding_is_to_nearest_even(isa: str) -> None:
    scale = torch.logspace(-37, 37, 64).unsqueeze(1)
    residual = (torch.randn(64, 1000) * scale).bfloat16()
    x = (residual * torch.randn(64, 1000)).bfloat16()
    x[:, ::2] = residual[:, ::2] * 2.0**-8  # sums halfway between two numbers
    residual[0, :3] = torch.tensor([torch.inf, -torch.inf, 3.39e38])
    x[0, :3] = torch.tensor([0.0, 0.0, 3e36])
    expected = residual + x
    ops.fused_add_rms_norm(x, residual, torch.ones(1000).bfloat16(), 1e-5)
    assert torch.equal(residual, expected)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_many_rows_in_parallel(num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    x, weight = torch.randn(300, 200), torch.randn(200)
    assert_close(ops.rms_norm(x, weight, 1e-5), rms_norm_twin(x, weight, 1e-5), x.dtype)
    assert_close(ops.silu_and_mul(x), silu_and_mul_twin(x), x.dtype)


class TestErrors:
    x = torch.zeros(2, 8)

    def test_rms_norm(self) -> None:
        with pytest.raises(ValueError, match=r"rms_norm: weight must have shape \[8\], got \[7\]"):
            ops.rms_norm(self.x, torch.zeros(7), 1e-5)
        with pytest.raises(ValueError, match="weight must be of type float32, got bfloat16"):
            ops.rms_norm(self.x, torch.zeros(8).bfloat16(), 1e-5)
        with pytest.raises(ValueError, match="x must be of type bfloat16 or float32, got float64"):
            ops.rms_norm(self.x.double(), torch.zeros(8).double(), 1e-5)
        with pytest.raises(ValueError, match="x must have stride 1 in its last dimension"):
            ops.rms_norm(torch.zeros(8, 2).T, torch.zeros(8), 1e-5)
        with pytest.raises(ValueError, match="x must have 2 or 3 dimensions, got 1"):
            ops.rms_norm(torch.zeros(8), torch.zeros(8), 1e-5)

    def test_fused_add_rms_norm(self) -> None:
        with pytest.raises(ValueError, match=r"residual must have the shape of x, \[2, 8\]"):
            ops.fused_add_rms_norm(self.x, torch.zeros(3, 8), torch.zeros(8), 1e-5)

    def test_apply_rope(self) -> None:
        q, positions = torch.zeros(2, 3, 16), torch.tensor([0, 10])
        with pytest.raises(ValueError, match=r"positions\[1\] is 10, allowed is 0 to 9"):
            ops.apply_rope(positions, q, q, torch.zeros(10, 16))
        with pytest.raises(ValueError, match="at most the head_dim of q, 16, got 32"):
            ops.apply_rope(positions, q, q, torch.zeros(20, 32))

    def test_silu_and_mul(self) -> None:
        with pytest.raises(ValueError, match=r"gate_up must have shape \[2, 6\], got \[2, 7\]"):
            ops.silu_and_mul(torch.zeros(2, 7))
