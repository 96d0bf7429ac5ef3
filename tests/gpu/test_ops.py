"""The CUDA row-wise kernels against their CPU twins."""

from __future__ import annotations

import pytest
import torch

from loraplex.engine.models import ops

DTYPES = [torch.bfloat16, torch.float32]
TOLERANCE = {
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-2},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 100, 576, 4096, 4100])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms(dtype: torch.dtype, size: int, offset: float) -> None:
    torch.manual_seed(0)
    x, residual, weight = (torch.randn(*s, dtype=dtype) for s in ((7, size), (7, size), (size,)))
    on_gpu = [tensor.cuda() for tensor in (x, residual, weight)]
    torch.testing.assert_close(
        ops.rms_norm(on_gpu[0], on_gpu[2], 1e-5, offset).cpu(),
        ops.rms_norm(x, weight, 1e-5, offset), **TOLERANCE[dtype],
    )  # fmt: skip
    ops.fused_add_rms_norm(x, residual, weight, 1e-5, offset)
    ops.fused_add_rms_norm(*on_gpu, 1e-5, offset)
    torch.testing.assert_close(on_gpu[0].cpu(), x, **TOLERANCE[dtype])
    torch.testing.assert_close(on_gpu[1].cpu(), residual, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_rope(dtype: torch.dtype, head_dim: int) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(9, 6, head_dim).to(dtype)
    positions, cache = torch.randint(0, 50, (9,)), torch.randn(50, head_dim)
    on_gpu = qkv.cuda()
    ops.apply_rope(positions, qkv[:, :4], qkv[:, 4:5], cache)
    ops.apply_rope(positions.cuda(), on_gpu[:, :4], on_gpu[:, 4:5], cache.cuda())
    torch.testing.assert_close(on_gpu.cpu(), qkv, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [8, 100, 1536, 14336])
@pytest.mark.parametrize("act_and_mul", [ops.silu_and_mul, ops.gelu_tanh_and_mul])
def test_gated_activations(act_and_mul, dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(0)
    gate_up = torch.randn(5, 2 * size).to(dtype)
    result = act_and_mul(gate_up.cuda()).cpu()
    torch.testing.assert_close(result, act_and_mul(gate_up), **TOLERANCE[dtype])


def test_tensors_on_two_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="weight must be on the device of x"):
        ops.rms_norm(torch.ones(2, 8).cuda(), torch.ones(8), 1e-5)
