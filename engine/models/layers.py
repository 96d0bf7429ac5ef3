"""Building blocks of models: linears that fuse several checkpoint tensors, embedding, rope, norm.

`named_weights` says where each checkpoint tensor goes. What a linear's weight is made of is its own
business (see weights.py), so that models do not know of quantisation. Knows neither LoRA nor
attention; `batch` is passed through for those who wrap a layer.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from loraplex.engine.models.config import head_dim
from loraplex.engine.models.weights import DenseWeight, NamedPlaces, Weight


class ForwardBatch(Protocol):
    """What a model asks of the batch it computes."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Write k and v to the KV cache of the layer and attend to it.

        q [num_tokens, num_heads, head_dim], k and v [num_tokens, num_kv_heads, head_dim];
        returns [num_tokens, num_heads * head_dim].
        """


class Linear:
    """y = x W^T + b, where W is one or several checkpoint tensors, one above the other.

    Its weight has the model's dtype until a quantised checkpoint gives it another, before loading.
    """

    def __init__(
        self,
        prefix: str,
        in_features: int,
        out_features: dict[str, int],
        dtype: torch.dtype,
        has_bias: bool = False,
    ) -> None:
        """out_features: rows by the last name of each checkpoint tensor, e.g. "q_proj"."""
        self.prefix = prefix
        self.in_features = in_features
        self.out_features = out_features
        # Without elements; for its dtype and device.
        self.like = torch.empty(0, dtype=dtype)
        self.bias = self.like.new_empty(sum(out_features.values())) if has_bias else None
        self.weight: Weight = DenseWeight(in_features, out_features, self.like)

    def __call__(self, x: torch.Tensor, batch: Any) -> torch.Tensor:
        """x [num_tokens, in_features] -> [num_tokens, total out_features]."""
        return self.weight.multiply(x, self.bias)

    def tie(self, tensor: torch.Tensor) -> None:
        """Multiply by a tensor that is loaded as something else: the embedding."""
        self.weight = DenseWeight.of(tensor)

    def named_weights(self) -> NamedPlaces:
        """Name of every checkpoint tensor, and where it goes. Called once: it allocates them."""
        for name, place in self.weight.places():
            yield self.prefix + name, place
        if self.bias is not None:
            parts = self.bias.split(list(self.out_features.values()))
            for name, part in zip(self.out_features, parts, strict=True):
                yield f"{self.prefix}{name}.bias", part

    def pack(self) -> None:
        """Called once, when all weights are in."""
        self.weight.pack()


def rope_cos_sin_cache(config: Any, max_model_len: int) -> torch.Tensor:
    """Cosines, then sines, of every position: float32 [max_model_len, head_dim].

    Raises ValueError for a kind of rope scaling that depends on the length of each request.
    """
    parameters = config.rope_parameters
    rope_type = parameters.get("rope_type", "default")
    if rope_type == "default":
        dim = head_dim(config)
        exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
        inv_freq, scaling = 1.0 / parameters["rope_theta"] ** exponents, 1.0
    elif rope_type in ("linear", "llama3", "yarn"):
        inv_freq, scaling = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"))
    else:
        raise ValueError(
            f"rope_type={rope_type!r} of this model is not supported: "
            "it must be one of default, linear, llama3, yarn"
        )
    positions = torch.arange(max_model_len).float()
    angles = torch.outer(positions, inv_freq.to(positions))
    return torch.cat([angles.cos() * scaling, angles.sin() * scaling], dim=-1)
