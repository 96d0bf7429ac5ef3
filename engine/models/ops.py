"""Row-wise operations of the models. For tensors in host memory, by the native library.

x, q, k and gate_up are bfloat16 or float32, with stride 1 in the last dimension and any strides
before it. All compute in float32 and round once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from loraplex import native

Tensor = torch.Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """RMS norm of the rows of x, [num_tokens, size] or [num_tokens, num_heads, size].

    Semantics: x * rsqrt(mean(x ** 2, -1) + eps) * (weight + offset)
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    native.rms_norm(out, x, weight, eps, offset)
    return out


def fused_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0
) -> None:
    """Adds x to the residual stream, in place, and leaves the stream's norm in x.

    Semantics: residual += x; x[:] = rms_norm(residual, weight, eps, offset)
    """
    native.fused_add_rms_norm(x, residual, weight, eps, offset)


def apply_rope(positions: Tensor, q: Tensor, k: Tensor, cos_sin_cache: Tensor) -> None:
    """Rotary position embedding in place, NeoX style: dimension i turns with i + rotary_dim / 2.

    positions int64 [num_tokens]; q [num_tokens, num_heads, head_dim] and k likewise; cos_sin_cache
    float32 [max_position, rotary_dim], cosines in the first half of a row and sines in the second,
    rotary_dim <= head_dim.

    Semantics, for q and k:
        cos, sin = cos_sin_cache[positions].unsqueeze(1).chunk(2, -1)
        first, second = q[..., :rotary_dim].chunk(2, -1)
        q[..., :rotary_dim] = cat((first * cos - second * sin, second * cos + first * sin), -1)
    """
    native.apply_rope(positions, q, k, cos_sin_cache)


def apply_interleaved_rope(positions: Tensor, q: Tensor, k: Tensor, cos_sin_cache: Tensor) -> None:
    """Like apply_rope, but dimension 2 i turns with 2 i + 1. In plain torch.

    Semantics, for q and k:
        cos, sin = cos_sin_cache[positions].unsqueeze(1).chunk(2, -1)
        first, second = q[..., 0:rotary_dim:2], q[..., 1:rotary_dim:2]
        q[..., 0:rotary_dim:2] = first * cos - second * sin
        q[..., 1:rotary_dim:2] = second * cos + first * sin
    """
    cos, sin = cos_sin_cache[positions].unsqueeze(1).chunk(2, -1)
    for x in (q, k):
        pairs = x[..., : cos_sin_cache.shape[1]].unflatten(-1, (-1, 2))
        first, second = pairs.float().unbind(-1)
        pairs.copy_(torch.stack((first * cos - second * sin, second * cos + first * sin), -1))


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """The gated activation of the MLP: gate_up [num_tokens, 2 * size] -> [num_tokens, size].

    Semantics: gate, up = gate_up.chunk(2, -1); silu(gate) * up
    """
    out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    native.silu_and_mul(out, gate_up)
    return out


def gelu_tanh_and_mul(gate_up: Tensor) -> Tensor:
    """Gemma's: gate_up [num_tokens, 2 * size] -> [num_tokens, size].

    Semantics: gate, up = gate_up.chunk(2, -1); gelu(gate, approximate="tanh") * up
    """
    out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    native.gelu_tanh_and_mul(out, gate_up)
    return out


# Not hot in the models that are measured, and in plain torch: rounded after the activation, too.


def gelu_tanh(x: Tensor) -> Tensor:
    """Semantics: gelu(x, approximate="tanh")"""
    return F.gelu(x, approximate="tanh")


def gelu_and_mul(gate_up: Tensor) -> Tensor:
    """Semantics: gate, up = gate_up.chunk(2, -1); gelu(gate) * up"""
    gate, up = gate_up.chunk(2, -1)
    return F.gelu(gate) * up


def grouped_linear(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Rows of x by matrices of their own: x [num_rows, in_features], weights [num_groups,
    out_features, in_features], ends int32 [num_groups].

    Semantics: out[ends[g - 1] : ends[g]] = x[ends[g - 1] : ends[g]] @ weights[g].T
    """
    if x.is_cuda and x.dtype != torch.bfloat16:
        # torch has no kernel; not for CUDA graphs, which such dtypes have not.
        sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
        parts = zip(x.split(sizes), weights, strict=True)
        return torch.cat([F.linear(rows, weight) for rows, weight in parts])
    return F.grouped_mm(x, weights.transpose(1, 2), offs=ends)
