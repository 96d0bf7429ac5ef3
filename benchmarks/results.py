"""Writes what a benchmark measured, with the machine, the versions and the command that did it."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = ("loraplex", "torch", "transformers", "peft", "numpy", "flashinfer-python")


def milliseconds(seconds: Sequence[float]) -> dict[str, float] | None:
    """Mean and percentiles of these times, in milliseconds; None of none."""
    if not seconds:
        return None
    p50, p90, p99 = np.percentile(seconds, [50, 90, 99])
    figures = {"mean": np.mean(seconds), "p50": p50, "p90": p90, "p99": p99}
    return {name: round(float(value) * 1e3, 3) for name, value in figures.items()}


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def gpu_facts() -> dict[str, Any]:
    """The accelerators and torch's CUDA; nothing where there is none."""
    import torch

    if not torch.cuda.is_available():
        return {}
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"gpu": names[0], "num_gpus": len(names), "cuda": torch.version.cuda}


def result_path(name: str, output: Path | None = None) -> Path:
    """Where a result goes: `output`, else benchmarks/results/NAME.json in a checkout's root, else
    NAME.json here."""
    if output is not None:
        return output
    results = Path("benchmarks/results")
    return (results if results.is_dir() else Path()) / f"{name}.json"


def write_result(name: str, figures: Any, output: Path | None = None) -> Path:
    """Write the result as JSON to its result_path, which is returned."""
    result = {
        "command": " ".join(_command()),
        "date": date.today().isoformat(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        **gpu_facts(),
        "versions": {"python": platform.python_version(), **dict(_versions())},
        "figures": figures,
    }
    path = result_path(name, output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def _command() -> list[str]:
    program = Path(sys.argv[0])
    if program.suffix == ".py":
        return ["python", os.path.relpath(program), *sys.argv[1:]]
    return [program.name, *sys.argv[1:]]


def _versions() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue
