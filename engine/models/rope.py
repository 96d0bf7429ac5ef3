"""Rotary positions: tables of cosines and sines, and how q and k turn by them."""

from __future__ import annotations

import logging
from typing import Any, Protocol

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from loraplex.engine.models import ops
from loraplex.engine.models.config import head_dim

logger = logging.getLogger(__name__)

Tensor = torch.Tensor
# Of transformers' own: those that are the same for requests of any length.
SCALED_ROPE_TYPES = ("linear", "llama3", "yarn", "longrope")


class Rope(Protocol):
    """Positions of q [num_tokens, num_heads, head_dim] and k, put into them in place."""

    def __call__(self, positions: Tensor, q: Tensor, k: Tensor) -> None: ...


class RotaryPositions:
    """Dimension i turns with i + rotary_dim / 2; dimensions from rotary_dim on stay."""

    def __init__(self, cos_sin_cache: Tensor) -> None:
        """cos_sin_cache: float32 [max_position, rotary_dim], cosines, then sines."""
        self.cos_sin_cache = cos_sin_cache

    def __call__(self, positions: Tensor, q: Tensor, k: Tensor) -> None:
        ops.apply_rope(positions, q, k, self.cos_sin_cache)


class InterleavedRotaryPositions(RotaryPositions):
    """Dimension 2 i turns with 2 i + 1."""

    def __call__(self, positions: Tensor, q: Tensor, k: Tensor) -> None:
        ops.apply_interleaved_rope(positions, q, k, self.cos_sin_cache)


class ScaledRotaryPositions(RotaryPositions):
    """q is also multiplied by a factor of its position."""

    def __init__(self, cos_sin_cache: Tensor, scales: Tensor) -> None:
        """scales: [max_position], of the model's dtype."""
        super().__init__(cos_sin_cache)
        self.scales = scales

    def __call__(self, positions: Tensor, q: Tensor, k: Tensor) -> None:
        super().__call__(positions, q, k)
        q.mul_(self.scales[positions][:, None, None])


def no_positions(positions: Tensor, q: Tensor, k: Tensor) -> None:
    """For layers that see the order of tokens by the causal mask alone."""


def rope_cos_sin_cache(config: Any, max_model_len: int, layer_type: str | None = None) -> Tensor:
    """Cosines, then sines, of every position: float32 [max_model_len, rotary_dim].

    layer_type: whose of the config's rope parameters, where it has them for types of layers.
    Raises ValueError for a kind of rope scaling that depends on the length of each request.
    """
    parameters = config.rope_parameters
    if layer_type is not None:
        parameters = parameters[layer_type]
    rope_type = parameters.get("rope_type", "default")
    options: dict[str, Any] = {} if layer_type is None else {"layer_type": layer_type}
    if rope_type == "longrope":
        # transformers chooses between short and long factors by each request's length, and starts
        # a request anew that outgrows the short ones. Cached keys cannot change, so that here all
        # of an engine's requests have the same.
        options["seq_len"] = max_model_len
        trained_len = parameters["original_max_position_embeddings"]
        if max_model_len > trained_len:
            logger.info(
                "max_model_len=%d is beyond the %d positions of the model's short rope factors: "
                "its long ones serve all requests", max_model_len, trained_len,
            )  # fmt: skip
    # Models are also made on the meta device, where these would have no values.
    with torch.device("cpu"):
        if rope_type == "default":
            dim = int(head_dim(config) * parameters.get("partial_rotary_factor", 1.0))
            exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
            inv_freq, scaling = 1.0 / parameters["rope_theta"] ** exponents, 1.0
        elif rope_type in SCALED_ROPE_TYPES:
            inv_freq, scaling = ROPE_INIT_FUNCTIONS[rope_type](config, **options)
        else:
            raise ValueError(
                f"rope_type={rope_type!r} of this model is not supported: "
                f"it must be one of default, {', '.join(SCALED_ROPE_TYPES)}"
            )
    positions = torch.arange(max_model_len).float()
    angles = torch.outer(positions, inv_freq.to(positions))
    return torch.cat([angles.cos() * scaling, angles.sin() * scaling], dim=-1)
