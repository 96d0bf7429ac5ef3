"""Which backend serves what, by name and by "auto"."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from attention_batch import Batch
from attention_shapes import make_shape

from loraplex.attention import backend
from loraplex.attention.backend import get_backend
from loraplex.attention.metadata import AttentionShape
from loraplex.attention.reference import ReferenceAttention
from loraplex.attention.sdpa import SdpaAttention


def cuda_shape(dtype: torch.dtype, head_dim: int, logits_soft_cap: float = 0.0) -> AttentionShape:
    shape = Batch([(1, 1)], dtype, head_dim, logits_soft_cap=logits_soft_cap).shape
    return replace(shape, device=torch.device("cuda"))


def test_unknown_backend() -> None:
    with pytest.raises(
        ValueError, match="attention_backend='fast' is not allowed.*'native'.*'sdpa'"
    ):
        get_backend("fast", make_shape(1.0, 16))


@pytest.mark.parametrize(
    ("name", "device", "message"),
    [
        ("flashinfer", "cpu", "'flashinfer' is not allowed on the device 'cpu'"),
        ("streamed", "cpu", "'streamed' is not allowed on the device 'cpu'"),
        ("native", "cuda", "native the CPU, sdpa and reference both"),
    ],
)
def test_wrong_device(name: str, device: str, message: str) -> None:
    shape = replace(make_shape(1.0, 16), device=torch.device(device))
    with pytest.raises(ValueError, match=message):
        get_backend(name, shape)


@pytest.mark.parametrize("logits_soft_cap", [0.0, 50.0])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_auto_on_cuda_is_flashinfer_where_it_serves(head_dim: int, logits_soft_cap: float) -> None:
    shape = cuda_shape(torch.bfloat16, head_dim, logits_soft_cap)
    assert backend._choose(shape) == "flashinfer"


@pytest.mark.parametrize(
    ("dtype", "head_dim", "logits_soft_cap", "expected"),
    [
        (torch.float32, 128, 0.0, SdpaAttention),
        (torch.bfloat16, 80, 0.0, SdpaAttention),
        (torch.bfloat16, 96, 30.0, ReferenceAttention),
        (torch.float32, 64, 30.0, ReferenceAttention),
    ],
)
def test_auto_on_cuda_beside_flashinfer(
    caplog: pytest.LogCaptureFixture,
    dtype: torch.dtype,
    head_dim: int,
    logits_soft_cap: float,
    expected: type,
) -> None:
    with caplog.at_level(logging.WARNING):
        chosen = get_backend("auto", cuda_shape(dtype, head_dim, logits_soft_cap))
    assert isinstance(chosen, expected)
    assert not chosen.supports_graphs
    [record] = caplog.records
    assert f"head_dim of {head_dim}" in record.getMessage()


@pytest.mark.parametrize("name", ["native", "reference", "sdpa"])
def test_a_window_that_the_shape_does_not_list(name: str) -> None:
    batch = Batch([(1, 40)], torch.float32, windows=(None, 16))
    for window in (None, 16):
        batch.run(name, window)
    with pytest.raises(AssertionError):
        batch.run(name, 17)
