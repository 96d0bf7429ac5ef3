"""Building blocks of models: linears that fuse several checkpoint tensors, embedding, rope, norm.

Weights are plain tensors; `named_weights` says which checkpoint tensor is copied into which view
of them. Knows neither LoRA nor attention; `batch` is passed through for those who wrap a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from loraplex.engine.models.config import head_dim

NamedWeights = Iterator[tuple[str, torch.Tensor]]

# The row count that packed weights are laid out for; other counts run on the same layout.
PACKING_ROWS = 64


class ForwardBatch(Protocol):
    """What a model asks of the batch it computes."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Write k and v to the KV cache of the layer and attend to it.

        q [num_tokens, num_heads, head_dim], k and v [num_tokens, num_kv_heads, head_dim];
        returns [num_tokens, num_heads * head_dim].
        """


class Linear:
    """y = x W^T + b, where W is one or several checkpoint tensors, one above the other."""

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
        total = sum(out_features.values())
        self.weight = torch.empty(total, in_features, dtype=dtype)
        self.bias = torch.empty(total, dtype=dtype) if has_bias else None
        self._multiply: Callable[[torch.Tensor], torch.Tensor] = self._multiply_plain

    def __call__(self, x: torch.Tensor, batch: Any) -> torch.Tensor:
        """x [num_tokens, in_features] -> [num_tokens, total out_features]."""
        return self._multiply(x)

    def named_weights(self) -> NamedWeights:
        row = 0
        for name, num_rows in self.out_features.items():
            yield f"{self.prefix}{name}.weight", self.weight[row : row + num_rows]
            if self.bias is not None:
                yield f"{self.prefix}{name}.bias", self.bias[row : row + num_rows]
            row += num_rows

    def pack(self) -> None:
        """Lay the loaded weight out the way oneDNN reads it fastest; drops the plain copy.

        Up to three times the speed of F.linear at few rows, where F.linear lays out anew each call.
        """
        is_served = self.weight.device.type == "cpu" and self.weight.dtype == torch.bfloat16
        if not (is_served and torch.backends.mkldnn.is_available()):
            return
        self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, PACKING_ROWS)
        self._multiply = self._multiply_packed

    def _multiply_plain(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)

    def _multiply_packed(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


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
