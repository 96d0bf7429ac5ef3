"""The backends for GPUs over strided views of the pool, against the reference in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_batch import (
    DTYPES,
    FLOAT8,
    KV_DTYPES,
    WINDOWED,
    WINDOWS,
    Batch,
    Requests,
    check_float8_writes,
    same_bytes,
)

from loraplex.attention.backend import get_backend
from loraplex.attention.metadata import AttentionMetadata, AttentionShape

MIXED = [(1, 1), (1, 17), (9, 9), (1, 130), (5, 70), (33, 33), (1, 64), (300, 700)]
DECODE = [(1, 1), (1, 16), (1, 17), (1, 500), (1, 1000)]
# More than multiprocessors, some in several shares and some in one.
MANY = [(1, 1 + 37 * i % 900) for i in range(200)]
RELATIVE_ERROR = {torch.float32: 2e-5, torch.bfloat16: 4e-3}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def check_twice(batch: Batch, backend: str) -> None:
    """A step, and another that is planned in the same place; every window is one of its layers."""
    caches = batch.k_cache, batch.v_cache
    expected = [cache.clone() for cache in caches]
    batch.plan("reference").write_kv(batch.k, batch.v, *expected)
    shared = get_backend(backend, batch.shape)
    for _ in range(2):
        planned = shared.plan(batch.metadata)
        for window in batch.shape.windows:
            result = planned.attend(batch.q, batch.k, batch.v, *caches, window).double()
            for cache, want in zip(caches, expected, strict=True):
                assert same_bytes(cache, want)
            exact = batch.exact(window)
            for begin, end in batch.bounds():
                error = (result[begin:end] - exact[begin:end]).norm()
                assert error <= RELATIVE_ERROR[batch.q.dtype] * exact[begin:end].norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [4, 64])
def test_float8_is_rounded_as_by_torch(dtype: torch.dtype, head_dim: int) -> None:
    check_float8_writes(head_dim, dtype, "cuda")


@pytest.mark.parametrize("requests", [MIXED, DECODE], ids=["mixed", "decode"])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize(
    ("head_dim", "heads"), [(64, (9, 3)), (128, (32, 8)), (128, (7, 1)), (256, (8, 4))]
)
def test_flashinfer(
    requests: Requests, kv_dtype: torch.dtype | None, head_dim: int, heads: tuple[int, int]
) -> None:
    num_heads, num_kv_heads = heads
    batch = Batch(
        requests, torch.bfloat16, head_dim, num_kv_heads, num_heads // num_kv_heads,
        windows=(None,), device="cuda", kv_dtype=kv_dtype,
    )  # fmt: skip
    check_twice(batch, "flashinfer")


@pytest.mark.parametrize("requests", [MIXED, WINDOWED, DECODE], ids=["mixed", "windowed", "decode"])
@pytest.mark.parametrize(
    ("logits_soft_cap", "windows", "kv_dtype"),
    [
        (0.0, WINDOWS, None),
        (30.0, WINDOWS, None),
        (30.0, WINDOWS, FLOAT8),
        (30.0, (None,), None),
        (0.0, (16,), None),
    ],
)
def test_flashinfer_windows_and_soft_caps(
    requests: Requests,
    logits_soft_cap: float,
    windows: tuple[int | None, ...],
    kv_dtype: torch.dtype | None,
) -> None:
    batch = Batch(
        requests, torch.bfloat16, 128, num_kv_heads=8, group=4,
        logits_soft_cap=logits_soft_cap, windows=windows, device="cuda", kv_dtype=kv_dtype,
    )  # fmt: skip
    check_twice(batch, "flashinfer")


@pytest.mark.parametrize("heads", [(32, 8), (8, 8), (40, 10), (48, 12), (32, 4), (28, 4)])
@pytest.mark.parametrize(
    "requests",
    [MIXED, DECODE, MANY, [(1, 70_000)], [(1, 1)], [(1, 5)] * 300],
    ids=["mixed", "decode", "many", "one long", "one token", "one page each"],
)
def test_streamed(requests: Requests, heads: tuple[int, int]) -> None:
    num_heads, num_kv_heads = heads
    batch = Batch(
        requests, torch.bfloat16, 128, num_kv_heads, num_heads // num_kv_heads, windows=(None,),
        device="cuda",
    )  # fmt: skip
    check_twice(batch, "streamed")
    planned = batch.plan("streamed")
    rows = batch.q, batch.k, batch.v
    first, second = (planned.attend(*rows, batch.k_cache, batch.v_cache) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("head_dim", 64), ("block_size", 32), ("num_kv_heads", 16), ("kv_dtype", FLOAT8),
        ("num_heads", 72), ("logits_soft_cap", 30.0), ("windows", (None, 16)),
    ],
)  # fmt: skip
def test_what_is_not_streamed_is_refused(option: str, value: Any) -> None:
    dtype = torch.bfloat16
    shape = AttentionShape(32, 8, 128, 1.0, 16, dtype, dtype, torch.device("cuda"), 16, 1000)
    # By name: where there is no GPU, FlashInfer can't be imported.
    assert type(get_backend("auto", shape)).__name__ == "StreamedAttention"
    other = replace(shape, **{option: value})
    assert type(get_backend("auto", other)).__name__ == "FlashInferAttention"
    with pytest.raises(ValueError, match="'streamed' is not allowed for this model"):
        get_backend("streamed", other)


@pytest.mark.parametrize("requests", [MIXED, DECODE], ids=["mixed", "decode"])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_graphs_follow_the_plans_of_all_windows(
    requests: Requests, kv_dtype: torch.dtype | None
) -> None:
    check_graph("flashinfer", requests, (None, 16, 600), kv_dtype)


@pytest.mark.parametrize("requests", [DECODE, MANY], ids=["decode", "many"])
def test_graphs_follow_the_plans_of_streamed_attention(requests: Requests) -> None:
    check_graph("streamed", requests, (None,))


def check_graph(
    name: str,
    requests: Requests,
    windows: tuple[int | None, ...],
    kv_dtype: torch.dtype | None = None,
) -> None:
    """Layers of several windows in one graph, replayed for other requests than it was made for,
    which do not fill it."""
    batch = Batch(
        requests, torch.bfloat16, 128, 8, 4, windows=windows, device="cuda", kv_dtype=kv_dtype
    )
    num_tokens = len(batch.q)
    bucket = num_tokens + 5
    caches = batch.k_cache, batch.v_cache
    batch.plan("reference").write_kv(batch.k, batch.v, *caches)
    qkv = torch.cat([batch.qkv, torch.full_like(batch.qkv[:1], torch.nan).expand(5, -1, -1)])
    q, k, v = qkv.split([32, 8, 8], dim=1)
    backend = get_backend(name, replace(batch.shape, max_num_requests=bucket, max_num_pages=8000))
    assert backend.supports_graphs
    idle = AttentionMetadata(
        cu_seqlens_q=torch.arange(bucket + 1, dtype=torch.int32),
        seq_lens=torch.ones(bucket, dtype=torch.int32),
        block_table=torch.zeros(bucket, 1, dtype=torch.int32),
        slot_mapping=torch.zeros(bucket, dtype=torch.int64, device="cuda"),
        max_query_len=1,
        graph_num_tokens=bucket,
    )
    planned = backend.plan(idle)

    def run() -> list[torch.Tensor]:
        return [planned.attend(q, k, v, *caches, window) for window in windows]

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    for _ in range(2):
        backend.plan(replace(batch.metadata, graph_num_tokens=bucket))
        graph.replay()
        for window, result in zip(windows, results, strict=True):
            exact = batch.exact(window)
            error = (result[:num_tokens].double() - exact).norm()
            assert error <= RELATIVE_ERROR[torch.bfloat16] * exact.norm()
        backend.plan(idle)
        graph.replay()


@pytest.mark.parametrize("requests", [WINDOWED, DECODE], ids=["windowed", "decode"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize(("head_dim", "heads"), [(64, (9, 3)), (80, (8, 8)), (96, (8, 2)),
                                                 (112, (7, 1)), (128, (32, 8))])  # fmt: skip
def test_sdpa(
    requests: Requests,
    dtype: torch.dtype,
    kv_dtype: torch.dtype | None,
    head_dim: int,
    heads: tuple[int, int],
) -> None:
    num_heads, num_kv_heads = heads
    batch = Batch(
        requests, dtype, head_dim, num_kv_heads, num_heads // num_kv_heads, device="cuda",
        kv_dtype=kv_dtype,
    )  # fmt: skip
    check_twice(batch, "sdpa")


def test_a_head_dim_that_would_be_wrong_is_refused() -> None:
    dtype = torch.bfloat16
    shape = AttentionShape(8, 2, 80, 1.0, 16, dtype, dtype, torch.device("cuda"), 16, 1000)
    with pytest.raises(ValueError, match="head_dim of 80"):
        get_backend("flashinfer", shape)
