"""The layers of transformers' implementations, with linears, routers and experts of ours in place
of theirs, so that adapters attach to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from loraplex.engine.models.blocks import ForwardBatch
from loraplex.engine.models.experts_weight import DenseExperts
from loraplex.engine.models.layers import ExpertLinears, Linear, Router, Routing
from loraplex.engine.models.moe import mix_experts
from loraplex.engine.models.weights import DenseWeight

Tensor = torch.Tensor


@dataclass(slots=True)
class ServedState:
    """What transformers' modules find where they have no argument for it."""

    batch: ForwardBatch | None
    windows: tuple[int | None, ...]
    dtype: torch.dtype


class ServedLayer:
    """The linears of a block."""

    def __init__(self, block: nn.Module, prefix: str, state: ServedState) -> None:
        self._linears: list[_ServedLinear | _ServedRouter] = []
        self._experts: list[_ServedExperts] = []
        for path, module in list(block.named_modules()):
            if _is_linear(module):
                parent, _, name = path.rpartition(".")
                linear = _ServedLinear(module, f"{prefix}{parent}." if parent else prefix, name)
                linear.loraplex_state = state
                setattr(block.get_submodule(parent), name, linear)
                self._linears.append(linear)
            elif _is_experts(module):
                parent, _, name = path.rpartition(".")
                experts = _ServedExperts(module, f"{prefix}{path}.", state)
                setattr(block.get_submodule(parent), name, experts)
                self._experts.append(experts)
            elif _is_router(module, state.dtype):
                self._linears.append(_ServedRouter(module, f"{prefix}{path}", state))

    def names(self) -> set[str]:
        """Of all its linears."""
        return {name for _, _, linear in self.linears() for name in linear.paths("").values()}

    def linears(self) -> Iterator[tuple[object, str, Linear]]:
        """Owner, attribute name and value of every linear."""
        for owner in self._linears:
            yield owner, "linear", owner.linear

    def expert_linears(self) -> Iterator[tuple[object, str, ExpertLinears]]:
        """The same of those of experts."""
        for owner in self._experts:
            yield owner, "gate_up", owner.gate_up
            yield owner, "down", owner.down


class _ServedLinear(nn.Module):
    """Has a Linear, or what wraps it, do the work of transformers' linear."""

    linear: Any
    loraplex_state: ServedState

    def __init__(self, module: Any, prefix: str, name: str) -> None:
        super().__init__()
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight
        out_features, in_features = weight.shape
        with weight.device:
            linear = Linear(prefix, in_features, {name: out_features}, weight.dtype)
        linear.weight = DenseWeight.of(weight.detach())
        linear.bias = None if module.bias is None else module.bias.detach()
        linear.finish_loading()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x.flatten(0, -2), self.loraplex_state.batch)
        return y.view(*x.shape[:-1], -1)


class _ServedRouter:
    """Has a Router, or what wraps it, do the work of the one product in a router of transformers,
    which goes on to choose experts."""

    linear: Any

    def __init__(self, module: Any, path: str, state: ServedState) -> None:
        self._weight, self._forward, self._state = module.weight, module.forward, state
        (num_experts, hidden), (prefix, dot, name) = module.weight.shape, path.rpartition(".")
        with module.weight.device:
            self.linear = Router(prefix + dot, hidden, {name: num_experts}, module.weight.dtype)
        self.linear.weight = DenseWeight.of(module.weight.detach())
        module.forward = self

    def __call__(self, *args: Any, **options: Any) -> Any:
        with _ProductsBy(self._weight, lambda x: self.linear(x, self._state.batch)):
            return self._forward(*args, **options)


class _ProductsBy(TorchFunctionMode):
    """While it is entered, products by a weight are another's work."""

    def __init__(self, weight: Tensor, multiply: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._weight, self._multiply = weight, multiply
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_ours = func is F.linear and not kwargs and args[1] is self._weight
        if is_ours and all(bias is None for bias in args[2:]):
            self.count += 1
            return self._multiply(args[0].flatten(0, -2)).unflatten(0, args[0].shape[:-1])
        return func(*args, **(kwargs or {}))


class _ServedExperts(nn.Module):
    """Has ExpertLinears, or what wraps them, do the work of transformers' experts."""

    gate_up: Any
    down: Any

    def __init__(self, module: Any, prefix: str, state: ServedState) -> None:
        super().__init__()
        for name, attribute in (("gate_up_proj", "gate_up"), ("down_proj", "down")):
            weight = getattr(module, name).detach()
            num_experts, height, width = weight.shape
            linears = ExpertLinears(prefix, name, num_experts, width, {name: height}, weight)
            linears.weight = DenseExperts.of(weight)
            setattr(self, attribute, linears)
        self._num_experts = num_experts
        self._apply_gate = module._apply_gate
        self._state = state

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x [num_tokens, hidden]; chosen and weights [num_tokens, experts of a token]."""
        batch = self._state.batch

        def experts(rows: Tensor, routing: Routing) -> Tensor:
            hidden = self._apply_gate(self.gate_up(rows, batch, routing))
            y: Tensor = self.down(hidden, batch, routing)
            return y

        return mix_experts(experts, x, chosen, weights, self._num_experts)


def _is_linear(module: nn.Module) -> bool:
    # Of a subclass too, if it computes the same.
    return isinstance(module, Conv1D) or (
        isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    )


def _is_experts(module: Any) -> bool:
    """Whether it is experts as most models have them, of which transformers says so."""
    return (
        getattr(module, "is_concatenated", False)
        and module.has_gate
        and not (module.is_transposed or module.has_bias or module.has_post_expert_norm)
    )


def _is_router(module: Any, dtype: torch.dtype) -> bool:
    """Whether it is a router that multiplies what it is given by its weight, once and in the dtype
    of the model: adapters compute in no other."""
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith("Router") or not isinstance(weight, nn.Parameter):
        return False
    if weight.dtype != dtype:
        return False
    x = torch.zeros(2, weight.shape[-1], dtype=weight.dtype, device=weight.device)
    products = _ProductsBy(weight, lambda x: F.linear(x, weight))
    try:
        with products:
            module(x)
    except (RuntimeError, TypeError, ValueError):
        return False
    return products.count == 1
