"""How a request names the adapter that it wants: one, or several merged into one. No torch."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Any

from loraplex.engine.errors import describe
from loraplex.lora.recipe import Merge, is_finite_number


@dataclass(frozen=True)
class LoRARequest:
    """Names an adapter: the name is what users and metrics see, the path where it comes from.

    vLLM's form is taken, too: LoRARequest(name, number, path).
    Several adapters may be used as one, by merged_adapters instead of a path.
    Raises ValueError naming the field, its value and what is allowed.
    """

    lora_name: str
    lora_path: str = ""
    """A directory, hub:owner/name[@revision][/subfolder] or s3://bucket/prefix; see
    loraplex.lora.sources.reference."""
    merged_adapters: MergedAdapters | None = None
    scale: float = 1.0
    """What the adapter adds to the base model is multiplied by this. An adapter of another scale
    takes memory of its own."""
    token: str | None = field(default=None, repr=False)
    """Reads the hub for this request: what it may not read is not served, cached or not. None: the
    engine's own."""
    lora_int_id: int | None = field(default=None, repr=False, compare=False)
    """vLLM's number of the adapter, which says nothing here."""

    def __post_init__(self) -> None:
        number: Any = self.lora_path
        path: Any = self.merged_adapters
        if isinstance(number, int) and isinstance(path, str | os.PathLike):
            object.__setattr__(self, "lora_int_id", number)
            object.__setattr__(self, "lora_path", path)
            object.__setattr__(self, "merged_adapters", None)
        if isinstance(self.lora_path, os.PathLike):
            object.__setattr__(self, "lora_path", os.fspath(self.lora_path))
        for name in ("lora_name", "lora_path"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise ValueError(f"{name}={describe(value)} is not allowed: it must be a string")
        if not isinstance(self.token, str | None):
            raise ValueError("token=... is not allowed: it must be a string, or None")
        if not self.lora_name:
            raise ValueError("lora_name='' is not allowed: an adapter needs a name")
        if bool(self.lora_path) == (self.merged_adapters is not None):
            raise ValueError(
                f"lora_path={self.lora_path!r} of adapter {self.lora_name!r} is not allowed: "
                "give a directory that holds adapter_config.json, a hub id or s3://bucket/prefix, "
                "or else merged_adapters"
            )
        if not isinstance(self.merged_adapters, MergedAdapters | None):
            raise ValueError(
                f"merged_adapters={describe(self.merged_adapters)} is not allowed: it must be "
                "MergedAdapters, or None"
            )
        if not is_finite_number(self.scale):
            raise ValueError(
                f"scale={describe(self.scale)} of adapter {self.lora_name!r} is not allowed: it "
                "must be a finite number"
            )

    @property
    def parts(self) -> tuple[LoRARequest, ...]:
        """The adapters to read: itself, or those it merges, with its token where they have none."""
        if self.merged_adapters is None:
            return (self,)
        parts = self.merged_adapters.adapters
        return tuple(replace(part, token=part.token or self.token) for part in parts)

    @property
    def merge(self) -> Merge | None:
        """What becomes of the parts, with the scale; None: the only one is taken as it is."""
        if self.merged_adapters is not None:
            return self.merged_adapters.scaled(self.scale)
        return None if self.scale == 1 else Merge(weights=(self.scale,))


@dataclass(frozen=True, kw_only=True)
class MergedAdapters(Merge):
    """Adapters that become one, as PEFT's add_weighted_adapter merges them."""

    adapters: tuple[LoRARequest, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        is_list = isinstance(self.adapters, list | tuple)
        if not is_list or not all(isinstance(part, LoRARequest) for part in self.adapters):
            raise ValueError(
                f"adapters={describe(self.adapters)} is not allowed: it must be a list of "
                "LoRARequests"
            )
        object.__setattr__(self, "adapters", tuple(self.adapters))
        if len(self.adapters) != len(self.weights):
            raise ValueError(
                f"weights={self.weights} is not allowed: it must have one weight for each of the "
                f"{len(self.adapters)} adapters"
            )
        for adapter in self.adapters:
            if adapter.merge is not None:
                raise ValueError(
                    f"merged_adapters with {adapter.lora_name!r} is not allowed: an adapter that "
                    "is merged must have scale=1 and merge none itself; use weights"
                )

    def scaled(self, scale: float) -> Merge:
        """How the adapters are merged, for a multiple of the result."""
        return Merge(
            weights=tuple(scale * weight for weight in self.weights),
            strategy=self.strategy,
            density=self.density,
            majority_sign_method=self.majority_sign_method,
            seed=self.seed,
        )
