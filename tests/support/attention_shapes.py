from __future__ import annotations

import torch

from loraplex.attention.metadata import AttentionShape


def make_shape(scale: float, block_size: int) -> AttentionShape:
    """Enough of a shape for backends that take the rest from the tensors they are given."""
    return AttentionShape(
        num_heads=0,
        num_kv_heads=0,
        head_dim=0,
        scale=scale,
        block_size=block_size,
        dtype=torch.float32,
        kv_dtype=torch.float32,
        device=torch.device("cpu"),
        max_num_requests=0,
        max_num_pages=0,
    )
