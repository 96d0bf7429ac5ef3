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


def plot_latencies(
    latencies: Mapping[str, Mapping[str, Sequence[float]]], title: str, path: Path
) -> Path | None:
    """The share of requests (or gaps) that took at most so long: a panel for each kind of latency,
    in it a line for each name.

    latencies: seconds by kind and name.
    """
    figure = _new_figure(4 * len(latencies), 3.5)
    if figure is None:
        return None
    for axes, (kind, lines) in zip(
        figure.subplots(1, len(latencies), squeeze=False)[0], latencies.items(), strict=True
    ):
        for name, seconds in lines.items():
            times = np.sort(seconds) * 1e3
            axes.plot(times, np.arange(1, len(times) + 1) / max(len(times), 1), label=name)
        for quantile in (0.5, 0.9, 0.99):
            axes.axhline(quantile, color="grey", linewidth=0.5)
        axes.set(xlabel=f"{kind} (ms)", ylim=(0, 1.01))
        axes.grid(alpha=0.3)
        if len(lines) > 1:
            axes.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    return path


def plot_shares(shares: Mapping[str, Mapping[str, float]], title: str, path: Path) -> Path | None:
    """A panel of bars for each family of cases: the share of its floor that each case has."""
    num_columns = 4
    num_rows = -(-len(shares) // num_columns)
    most_cases = max((len(cases) for cases in shares.values()), default=0)
    figure = _new_figure(5 * num_columns, max(num_rows, 1) * (1 + 0.14 * most_cases))
    if figure is None:
        return None
    for index, (family, cases) in enumerate(shares.items()):
        axes = figure.add_subplot(num_rows, num_columns, index + 1)
        axes.barh(range(len(cases)), list(cases.values()), height=0.7)
        axes.set_yticks(range(len(cases)), list(cases), fontsize=7)
        axes.invert_yaxis()
        axes.set(title=family, xlim=(0, max(1.0, *cases.values())))
        axes.grid(alpha=0.3, axis="x")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    return path


def plot_decode(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> Path | None:
    """The share of the floor by batch size, a panel for each rank and a line for each number of
    distinct adapters; rows as decode_step.py writes them, those of no adapter in every panel."""
    ranks = sorted({row["rank"] for row in rows if row["adapters"]}) or [0]
    figure = _new_figure(4.5 * len(ranks), 4)
    if figure is None:
        return None
    batches = sorted({row["batch"] for row in rows})
    panels = figure.subplots(1, len(ranks), squeeze=False, sharey=True)[0]
    for axes, rank in zip(panels, ranks, strict=True):
        lines: dict[str, dict[int, float]] = {}
        for row in rows:
            if row["rank"] in (0, rank):
                for name in [str(row["adapters"])] + ["batch"] * (row["adapters"] == row["batch"]):
                    lines.setdefault(name, {})[row["batch"]] = row["share"]
        # A line of nothing but the point that the line "batch" has, too.
        lines = {n: shares for n, shares in lines.items() if [*map(str, shares)] != [n]}
        for name, shares in sorted(lines.items(), key=lambda line: (len(line[0]), line[0])):
            ordered = sorted(shares)
            places = [batches.index(batch) for batch in ordered]
            style = {"linestyle": "--"} if name == "batch" else {}
            axes.plot(places, [shares[b] for b in ordered], marker="o", label=name, **style)
        axes.set_xticks(range(len(batches)), [str(batch) for batch in batches])
        axes.set(xlabel="batch", title=f"rank {rank}")
        axes.set_ylim(0, 1.05)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("floor / measured")
    panels[-1].legend(title="adapters")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    return path


def plot_eviction(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> Path | None:
    """Saturated throughput and loaded times to first token, whichever there are: a group of bars
    for each workload and in it one for each kind of memory; rows as eviction.py writes them."""
    panels = [
        ("saturated", "tokens_per_second", "tokens/s, saturated", "linear"),
        ("loaded", "ttft_mean_ms", "mean TTFT (ms), loaded", "log"),
        ("loaded", "ttft_p99_ms", "p99 TTFT (ms), loaded", "log"),
    ]
    loads = {row["load"] for row in rows}
    panels = [panel for panel in panels if panel[0] in loads]
    figure = _new_figure(5 * len(panels), 4)
    if figure is None:
        return None
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    memories = list(dict.fromkeys(row["memory"] for row in rows))
    width = 0.8 / len(memories)
    for axes, (load, key, label, scale) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        for index, memory in enumerate(memories):
            of = {r["workload"]: r[key] for r in rows if (r["load"], r["memory"]) == (load, memory)}
            places = np.arange(len(workloads)) + (index - (len(memories) - 1) / 2) * width
            axes.bar(places, [of[name] for name in workloads], width, label=memory)
        axes.set_xticks(range(len(workloads)), workloads)
        axes.set(title=label, yscale=scale)
        axes.grid(alpha=0.3, axis="y")
    axes.legend()
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
