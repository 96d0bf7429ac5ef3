"""What adapters attach to, and the error of one that does not. No torch, no files."""

from __future__ import annotations

from dataclasses import dataclass


class AdapterError(ValueError):
    """An adapter cannot be served; `status` is the HTTP status that fits."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class LoRAModule:
    """A linear that every layer of the base model has, and that adapters may target."""

    name: str
    """As in "q_proj"."""
    path: str
    """Inside the layer, as in "self_attn.q_proj"."""
    in_features: int
    out_features: int


@dataclass(frozen=True)
class BaseModelSpec:
    """What a base model offers to adapters. A module's id is its index in `modules`."""

    architecture: str
    num_layers: int
    modules: tuple[LoRAModule, ...]
    layer_path: str = "model.layers"

    @property
    def num_modules(self) -> int:
        """Modules per layer."""
        return len(self.modules)

    def module_path(self, layer: int, module_id: int) -> str:
        """As in "model.layers.0.self_attn.q_proj"."""
        return f"{self.layer_path}.{layer}.{self.modules[module_id].path}"
