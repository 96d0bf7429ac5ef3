"""Mixtures of experts: Mixtral and Qwen3-MoE.

Nothing here waits for the device: each token's experts are found, sorted and multiplied by there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from loraplex.engine.models import ops
from loraplex.engine.models.blocks import FeedForward, ForwardBatch
from loraplex.engine.models.layers import ExpertLinears, Linear, Module, Router, Routing
from loraplex.engine.models.llama import LlamaForCausalLM, Qwen3ForCausalLM

Tensor = torch.Tensor


class Experts(Module):
    """The gated MLPs of all experts of a layer."""

    def __init__(self, prefix: str, num_experts: int, hidden: int, size: int, like: Tensor) -> None:
        """size: of what is between up and down; like: has the dtype and device to use."""
        widths = {"gate_proj": size, "up_proj": size}
        self.gate_up = ExpertLinears(prefix, "gate_up_proj", num_experts, hidden, widths, like)
        self.down = ExpertLinears(
            prefix, "down_proj", num_experts, size, {"down_proj": hidden}, like
        )

    def __call__(self, x: Tensor, batch: ForwardBatch, routing: Routing) -> Tensor:
        """x [num_rows, hidden], sorted by expert; the result is like x."""
        return self.down(ops.silu_and_mul(self.gate_up(x, batch, routing)), batch, routing)


def mix_experts(
    experts: Callable[[Tensor, Routing], Tensor],
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    num_experts: int,
) -> Tensor:
    """The weighted sums of what each token's experts make of it.

    experts: of rows that are sorted by expert; x [num_tokens, hidden]; chosen int64 and weights
    [num_tokens, experts of a token]; the result is like x.
    """
    order = chosen.flatten().argsort(stable=True)
    every = torch.arange(num_experts, device=x.device)
    ends = (chosen.flatten() == every[:, None]).sum(1).cumsum(0).int()
    tokens = order // chosen.shape[1]
    y = experts(x[tokens], Routing(ends, tokens))
    # Back in the order of tokens, so that sums are the same each time.
    y = y[order.argsort()].view(*chosen.shape, -1)
    return (y * weights.unsqueeze(-1)).sum(1).to(x.dtype)


class SparseMLP(FeedForward):
    """Each token goes to the experts that a router likes best, and gets their weighted sum."""

    def __init__(
        self, router: Linear, experts: Experts, num_per_token: int, is_normalised: bool
    ) -> None:
        """is_normalised: the weights of a token's experts are made to sum to 1."""
        self.router = router
        self.experts = experts
        self.num_per_token = num_per_token
        self.is_normalised = is_normalised

    def __call__(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        scores = self.router(x, batch).float().softmax(-1)
        weights, chosen = scores.topk(self.num_per_token, dim=-1)
        if self.is_normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        return mix_experts(
            lambda rows, routing: self.experts(rows, batch, routing),
            x,
            chosen,
            weights,
            scores.shape[1],
        )


def _make_mlp(model: LlamaForCausalLM, prefix: str, num_experts: int, size: int) -> SparseMLP:
    config: Any = model.config
    router = Router(prefix, config.hidden_size, {"gate": num_experts}, model.dtype)
    experts = Experts(f"{prefix}experts.", num_experts, config.hidden_size, size, router.like)
    is_normalised = getattr(config, "norm_topk_prob", True)
    return SparseMLP(router, experts, config.num_experts_per_tok, is_normalised)


class MixtralForCausalLM(LlamaForCausalLM):
    """Llama with experts in place of the MLP."""

    SUPPORTED = {"hidden_act": ("silu",)}
    OTHER_PARTS = {
        ".block_sparse_moe.": ".mlp.", ".w1.": ".gate_proj.", ".w2.": ".down_proj.",
        ".w3.": ".up_proj.",
    }  # fmt: skip

    def make_mlp(self, index: int, prefix: str) -> FeedForward:
        return _make_mlp(self, prefix, self.config.num_local_experts, self.config.intermediate_size)


class Qwen3MoeForCausalLM(Qwen3ForCausalLM):
    """Qwen3 with experts in place of the MLP, in most layers."""

    SUPPORTED = {"hidden_act": ("silu",)}

    def make_mlp(self, index: int, prefix: str) -> FeedForward:
        config = self.config
        is_dense = index in config.mlp_only_layers or (index + 1) % config.decoder_sparse_step
        if is_dense:
            return super().make_mlp(index, prefix)
        return _make_mlp(self, prefix, config.num_experts, config.moe_intermediate_size)
