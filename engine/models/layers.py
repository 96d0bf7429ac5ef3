"""Parts of models that own weights: linears that fuse several checkpoint tensors, and norms.

`named_weights` says where each checkpoint tensor goes. What a linear's weight is made of is its own
business (see weights.py), so that models do not know of quantisation. Knows neither LoRA nor
attention; `batch` is passed through for those who wrap a linear.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F

from loraplex.engine.models import ops
from loraplex.engine.models.experts_weight import DenseExperts, ExpertsWeight
from loraplex.engine.models.weights import DenseWeight, NamedPlaces, Weight
from loraplex.lora.spec import ONE_SECTION, Section

Tensor = torch.Tensor
ModuleKind = TypeVar("ModuleKind", bound="Module")


class Module:
    """A part of a model. Its own parts are those of its attributes that are Modules, and those in
    lists of them."""

    def parts(self) -> Iterator[tuple[str, Module]]:
        """Attribute name and value, in the order in which they were set."""
        for name, value in vars(self).items():
            for part in value if isinstance(value, list) else (value,):
                if isinstance(part, Module):
                    yield name, part

    def linears(self) -> Iterator[tuple[Module, str, Linear]]:
        """Owner, attribute name and value of every linear within."""
        return self._find(Linear)

    def expert_linears(self) -> Iterator[tuple[Module, str, ExpertLinears]]:
        """The same of the linears of experts."""
        return self._find(ExpertLinears)

    def _find(self, kind: type[ModuleKind]) -> Iterator[tuple[Module, str, ModuleKind]]:
        for name, part in self.parts():
            if isinstance(part, kind):
                yield self, name, part
            else:
                yield from part._find(kind)

    def units(self) -> Iterator[Module]:
        """What is loaded by itself: the parts that have no parts, or this, if it has none."""
        parts = [part for _, part in self.parts()]
        if not parts:
            yield self
        for part in parts:
            yield from part.units()

    def named_weights(self) -> NamedPlaces:
        """Of a unit: name of every checkpoint tensor, and where it goes. Called once: it allocates
        them."""
        yield from ()

    def finish_loading(self) -> None:
        """Of a unit: called once, when all its weights are in."""

    def sections_of(self, name: str) -> tuple[Section, ...]:
        """Of a unit: what is above each other in one of its checkpoint tensors, as q, k and v may
        be. A share of the model has its part of each."""
        return ONE_SECTION


class Linear(Module):
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
        self.sections: dict[str, tuple[Section, ...]] = {}
        # Without elements; for its dtype and device.
        self.like = torch.empty(0, dtype=dtype)
        self.bias = self.like.new_empty(sum(out_features.values())) if has_bias else None
        self.weight: Weight = DenseWeight(in_features, out_features, self.like)

    def __call__(self, x: Tensor, batch: Any) -> Tensor:
        """x [num_tokens, in_features] -> [num_tokens, total out_features]."""
        return self.weight.multiply(x, self.bias)

    def tie(self, tensor: Tensor) -> None:
        """Multiply by a tensor that is loaded as something else: the embedding."""
        self.weight = DenseWeight.of(tensor)

    def paths(self, prefix: str) -> dict[str, str]:
        """By the name of each checkpoint tensor, what follows `prefix` in it, as in
        "self_attn.q_proj"."""
        return {name: f"{self.prefix}{name}".removeprefix(prefix) for name in self.out_features}

    def named_weights(self) -> NamedPlaces:
        for name, place in self.weight.places():
            yield self.prefix + name, place
        if self.bias is not None:
            parts = self.bias.split(list(self.out_features.values()))
            for name, part in zip(self.out_features, parts, strict=True):
                yield f"{self.prefix}{name}.bias", part

    def sections_of(self, name: str) -> tuple[Section, ...]:
        return self.sections.get(name.removeprefix(self.prefix).partition(".")[0], ONE_SECTION)

    def finish_loading(self) -> None:
        self.weight.pack()


@dataclass(frozen=True, slots=True)
class Routing:
    """Rows that are sorted by expert; each is of a row of the batch."""

    ends: Tensor  # int32 [num_experts], where the rows of each expert end
    tokens: Tensor  # int64 [num_rows], the batch's rows, ascending within an expert


class ExpertLinears(Module):
    """y = x W^T with a W of each expert, which is one or several checkpoint tensors, one above the
    other.

    Its weight is dense until a quantised checkpoint gives it another, before loading.
    """

    def __init__(
        self,
        prefix: str,
        name: str,
        num_experts: int,
        in_features: int,
        out_features: dict[str, int],
        like: Tensor,
    ) -> None:
        """name: of all together, to adapters; out_features: rows by the last name of each
        checkpoint tensor of an expert; like: has the dtype and device to use."""
        self.prefix = prefix
        self.num_experts = num_experts
        self.in_features = in_features
        self.out_features = {name: sum(out_features.values())}
        self.sections = {name: tuple(map(Section, out_features.values()))}
        self.parts_of_output = out_features
        self.like = like
        self.weight: ExpertsWeight = DenseExperts(num_experts, in_features, out_features, like)

    def __call__(self, x: Tensor, batch: Any, routing: Routing) -> Tensor:
        """x [num_rows, in_features], sorted by expert -> [num_rows, total out_features]."""
        return self.weight.multiply(x, routing.ends)

    def paths(self, prefix: str) -> dict[str, str]:
        """As of a Linear."""
        return {name: f"{self.prefix}{name}".removeprefix(prefix) for name in self.out_features}

    def named_weights(self) -> NamedPlaces:
        for name, place in self.weight.places():
            yield self.prefix + name, place

    def finish_loading(self) -> None:
        self.weight.pack()


class Router(Linear):
    """The scores of experts, which no method quantises."""


class Table(Module):
    """Rows that are looked up by index: an embedding."""

    def __init__(self, name: str, num_rows: int, size: int, dtype: torch.dtype) -> None:
        self.name = name
        self.rows = torch.empty(num_rows, size, dtype=dtype)

    def named_weights(self) -> NamedPlaces:
        yield f"{self.name}.weight", self.rows

    def __call__(self, indices: Tensor) -> Tensor:
        """indices [num_tokens] -> [num_tokens, size]."""
        return F.embedding(indices, self.rows)


class RMSNorm(Module):
    """x / rms(x) * (OFFSET + weight), over the last dimension."""

    OFFSET: ClassVar[float] = 0.0

    def __init__(self, name: str, size: int, eps: float, dtype: torch.dtype) -> None:
        self.name = name
        self.eps = eps
        self.weight = torch.empty(size, dtype=dtype)
        self.sections = ONE_SECTION

    def named_weights(self) -> NamedPlaces:
        yield f"{self.name}.weight", self.weight

    def sections_of(self, name: str) -> tuple[Section, ...]:
        return self.sections

    def __call__(self, x: Tensor) -> Tensor:
        """x [num_tokens, size] or [num_tokens, num_heads, size]; the result likewise."""
        return ops.rms_norm(x, self.weight, self.eps, self.OFFSET)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """Add x to the residual stream, in place; the stream's norm, which may take x's place."""
        ops.fused_add_rms_norm(x, residual, self.weight, self.eps, self.OFFSET)
        return x


class OffsetRMSNorm(RMSNorm):
    """x / rms(x) * (1 + weight), as Gemma has it: the sum is not rounded."""

    OFFSET = 1.0


class LayerNorm(Module):
    """(x - mean) / deviation * weight + bias, over the last dimension; the bias may be missing."""

    def __init__(
        self, name: str, size: int, eps: float, dtype: torch.dtype, has_bias: bool = True
    ) -> None:
        self.name = name
        self.eps = eps
        self.weight = torch.empty(size, dtype=dtype)
        self.bias = torch.empty(size, dtype=dtype) if has_bias else None

    def named_weights(self) -> NamedPlaces:
        yield f"{self.name}.weight", self.weight
        if self.bias is not None:
            yield f"{self.name}.bias", self.bias

    def __call__(self, x: Tensor) -> Tensor:
        """x [num_tokens, size] or [num_tokens, num_heads, size]; the result likewise."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """Add x to the residual stream, in place; the stream's norm."""
        residual += x
        return self(residual)


class PerHeadLayerNorm(LayerNorm):
    """A layer norm without bias for each head, by weights of its own."""

    def __init__(
        self, name: str, heads: Section, head_dim: int, eps: float, dtype: torch.dtype
    ) -> None:
        super().__init__(name, head_dim, eps, dtype, has_bias=False)
        self.heads = heads
        self.weight = torch.empty(heads.size, head_dim, dtype=dtype)

    def sections_of(self, name: str) -> tuple[Section, ...]:
        return (self.heads,)

    def __call__(self, x: Tensor) -> Tensor:
        """x and the result: [num_tokens, num_heads, head_dim]."""
        normed = F.layer_norm(x.float(), x.shape[-1:], eps=self.eps)
        return (self.weight * normed).to(x.dtype)


Norm = RMSNorm | LayerNorm
