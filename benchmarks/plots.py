"""Pictures of what was measured. Without matplotlib (the extra `bench`) there are none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def plot_offline(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> Path | None:
    """Throughput by number of adapters, a line for each pass; rows as offline.py writes them."""
    figure = _new_figure(7, 4.5)
    if figure is None:
        return None
    axes = figure.subplots()
    counts = sorted({row["num_adapters"] for row in rows})
    for number in sorted({row["pass"] for row in rows}):
        of_pass = {r["num_adapters"]: r["requests_per_second"] for r in rows if r["pass"] == number}
        # At equal distances: the counts are powers of something, with a zero.
        places = [counts.index(count) for count in of_pass]
        axes.plot(places, list(of_pass.values()), marker="o", label=f"pass {number}")
    axes.set_xticks(range(len(counts)), [str(count) for count in counts])
    axes.set(xlabel="adapters", ylabel="requests/s", title=title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    return path


def plot_latencies(latencies: Mapping[str, Sequence[float]], title: str, path: Path) -> Path | None:
    """The share of requests (or gaps) that took at most so long, for each kind of latency.

    latencies: seconds by kind.
    """
    figure = _new_figure(4 * len(latencies), 3.5)
    if figure is None:
        return None
    for axes, (name, seconds) in zip(
        figure.subplots(1, len(latencies), squeeze=False)[0], latencies.items(), strict=True
    ):
        milliseconds = np.sort(seconds) * 1e3
        axes.plot(milliseconds, np.arange(1, len(milliseconds) + 1) / max(len(milliseconds), 1))
        for quantile in (0.5, 0.9, 0.99):
            axes.axhline(quantile, color="grey", linewidth=0.5)
        axes.set(xlabel=f"{name} (ms)", ylim=(0, 1.01))
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    return path


def _new_figure(width: float, height: float) -> Any:
    """A figure in inches, or None without matplotlib, which a line says."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed (pip install 'loraplex[bench]')")
        return None
    return Figure((width, height), layout="constrained")
