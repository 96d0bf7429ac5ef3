"""FlashInfer attention over strided views of the pool, against the reference in float64."""

from __future__ import annotations

import pytest
import torch

from loraplex.attention.backend import get_backend
from loraplex.attention.metadata import AttentionMetadata, AttentionShape

BLOCK_SIZE = 16
MIXED = [(1, 1), (1, 17), (9, 9), (1, 130), (5, 70), (33, 33), (1, 64), (300, 700)]
DECODE = [(1, 1), (1, 16), (1, 17), (1, 500), (1, 1000)]


@pytest.mark.parametrize("requests", [MIXED, DECODE], ids=["mixed", "decode"])
@pytest.mark.parametrize(("head_dim", "heads"), [(64, (9, 3)), (128, (32, 8)), (128, (7, 1))])
def test_flashinfer(requests: list[tuple[int, int]], head_dim: int, heads: tuple[int, int]) -> None:
    torch.manual_seed(0)
    num_heads, num_kv_heads = heads
    num_blocks = [-(-context // BLOCK_SIZE) for _, context in requests]
    pool = torch.randn(
        sum(num_blocks) + 5, 3, 2, BLOCK_SIZE, num_kv_heads, head_dim, device="cuda"
    ).bfloat16()
    pages = (torch.randperm(sum(num_blocks)) + 1).int().split(num_blocks)
    table = torch.zeros(len(requests), max(num_blocks), dtype=torch.int32)
    for row, own in zip(table, pages, strict=True):
        row[: len(own)] = own
    queries = torch.tensor([0, *(rows for rows, _ in requests)])
    slots = [
        own[torch.arange(context - rows, context) // BLOCK_SIZE].long() * BLOCK_SIZE
        + torch.arange(context - rows, context) % BLOCK_SIZE
        for (rows, context), own in zip(requests, pages, strict=True)
    ]
    metadata = AttentionMetadata(
        cu_seqlens_q=queries.cumsum(0).int(),
        seq_lens=torch.tensor([context for _, context in requests], dtype=torch.int32),
        block_table=table,
        slot_mapping=torch.cat(slots).cuda(),
        max_query_len=max(rows for rows, _ in requests),
    )
    shape = AttentionShape(
        num_heads, num_kv_heads, head_dim, head_dim**-0.5, BLOCK_SIZE, torch.bfloat16,
        torch.device("cuda"), max_num_requests=16, max_num_pages=1000,
    )  # fmt: skip
    rows = int(queries.sum())
    qkv = torch.randn(rows, num_heads + 2 * num_kv_heads, head_dim, device="cuda").bfloat16()
    q, k, v = qkv.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    caches = pool[:, 1, 0], pool[:, 1, 1]
    expected = [cache.clone() for cache in caches]
    reference = get_backend("reference", shape).plan(metadata)
    reference.write_kv(k, v, *expected)
    exact = reference.run(q.double(), *(cache.double() for cache in expected))
    backend = get_backend("flashinfer", shape)
    for _ in range(2):
        planned = backend.plan(metadata)
        planned.write_kv(k, v, *caches)
        assert torch.equal(caches[0], expected[0])
        assert torch.equal(caches[1], expected[1])
        result = planned.run(q, *caches).double()
        assert (result - exact).norm() <= 4e-3 * exact.norm()


def test_a_head_dim_that_would_be_wrong_is_refused() -> None:
    shape = AttentionShape(8, 2, 80, 1.0, 16, torch.bfloat16, torch.device("cuda"), 16, 1000)
    with pytest.raises(ValueError, match="head_dim of 80"):
        get_backend("flashinfer", shape)
