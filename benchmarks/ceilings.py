"""What a device does at best, as far as limits are computed from it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loraplex.engine.config import EngineConfig

# Measured on one H100 80GB.
CUDA_TERABYTES_PER_SECOND = 3.0
CUDA_TERAFLOPS = 798.0


@dataclass(frozen=True)
class Ceilings:
    """Any of them may be unknown."""

    bandwidth: float | None
    """Of the memory, in bytes a second."""
    flops: float | None = None
    """Of large products of matrices, a second."""


def add_bandwidth_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bandwidth", type=float, metavar="TB/S",
        help=f"of the memory, for the floor (default: {CUDA_TERABYTES_PER_SECOND} on a GPU; the "
        "CPU has none)",
    )  # fmt: skip


def add_flops_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--teraflops", type=float, metavar="N",
        help=f"of large products of matrices, for the floor (default: {CUDA_TERAFLOPS} on a GPU; "
        "the CPU has none)",
    )  # fmt: skip


def resolve_ceilings(options: argparse.Namespace, engine_options: Mapping[str, Any]) -> Ceilings:
    """Those that the flags give; on a GPU, else those of an H100. Raises ValueError."""
    # Imported late: it brings torch.
    from loraplex.engine.runner.device import resolve_device

    defaults = {"bandwidth": CUDA_TERABYTES_PER_SECOND, "teraflops": CUDA_TERAFLOPS}
    if resolve_device(EngineConfig.from_options(**engine_options)).type != "cuda":
        defaults = {}
    found: dict[str, float | None] = {}
    for name in ("bandwidth", "teraflops"):
        value = getattr(options, name, None)
        if value is not None and value <= 0:
            raise ValueError(f"--{name} {value} is not allowed: it must be above 0")
        value = value or defaults.get(name)
        found[name] = None if value is None else 1e12 * value
    return Ceilings(bandwidth=found["bandwidth"], flops=found["teraflops"])
