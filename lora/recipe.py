"""What an adapter is made of: one directory's tensors, or several directories' merged. No torch."""

from __future__ import annotations

import sys
from dataclasses import dataclass

STRATEGIES = ("linear", "cat", "ties", "dare_linear", "dare_ties", "magnitude_prune")
MAJORITY_SIGN_METHODS = ("total", "frequency")


@dataclass(frozen=True)
class Merge:
    """How adapters are merged (see loraplex.lora.merge).

    As in PEFT, a field that the strategy has no use for changes nothing.
    Raises ValueError naming the field, its value and what is allowed.
    """

    weights: tuple[float, ...]
    """One for each adapter, of either sign."""
    strategy: str = "linear"
    density: float = 1.0
    """Which part of the entries pruning keeps, above 0; 1: all."""
    majority_sign_method: str = "total"
    seed: int = 0
    """Decides which entries the dare strategies keep: the same seed, the same result."""

    def __post_init__(self) -> None:
        is_list = isinstance(self.weights, list | tuple)
        object.__setattr__(self, "weights", tuple(self.weights) if is_list else self.weights)
        are_finite = is_list and bool(self.weights) and all(map(is_finite_number, self.weights))
        _check("weights", self.weights, are_finite, "finite numbers, one for each adapter")
        _check("strategy", self.strategy, self.strategy in STRATEGIES, f"one of {STRATEGIES}")
        is_density = is_finite_number(self.density) and 0 < self.density <= 1
        _check("density", self.density, is_density, "above 0 and at most 1")
        method = self.majority_sign_method
        is_method = method in MAJORITY_SIGN_METHODS
        _check("majority_sign_method", method, is_method, f"one of {MAJORITY_SIGN_METHODS}")
        is_seed = type(self.seed) is int and self.seed >= 0
        _check("seed", self.seed, is_seed, "an integer of at least 0")


def is_finite_number(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max


def _check(name: str, value: object, is_allowed: bool, allowed: str) -> None:
    if not is_allowed:
        raise ValueError(f"{name}={value!r} is not allowed: it must be {allowed}")


@dataclass(frozen=True)
class MergeRecipe:
    """An adapter that is merged when it is read; of one directory it is only multiplied."""

    paths: tuple[str, ...]
    """PEFT directories."""
    merge: Merge


Recipe = str | MergeRecipe
"""A string: the PEFT directory of an adapter that is taken as it is."""
