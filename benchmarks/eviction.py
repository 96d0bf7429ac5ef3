"""Eviction policies against each other and against a fixed split of the memory, in simulated time.

The real EngineCore, with its scheduler, pool, KV manager and adapter manager, serves conversations
(conversations.py) on a simulated H100 with Llama-3-8B (simulated_device.py). Each workload comes
twice:

    loaded      at a rate just below what the device can serve: times to first token
    saturated   at a rate above that: throughput

The first third, in which the pool fills and policies learn, is left out. All configurations see the
same conversations; a next turn comes so long after the answer before, so that a slow answer delays
it.

    python benchmarks/eviction.py
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from loraplex.benchmarks.conversations import WORKLOADS
from loraplex.benchmarks.plots import plot_eviction
from loraplex.benchmarks.replay import Replay
from loraplex.benchmarks.results import milliseconds, write_result
from loraplex.benchmarks.simulated_device import CostModel, SimulatedDevice
from loraplex.benchmarks.split_pool import SplitPool
from loraplex.engine.config import EngineConfig
from loraplex.engine.core import EngineCore, PoolMaker
from loraplex.engine.memory.eviction import POLICIES
from loraplex.engine.memory.page_pool import PagePool

LOADS = ("loaded", "saturated")
# Requests per second, or conversations where they have more than one turn, by load.
RATES = {
    "uniform": (42.0, 60.0),
    "zipf": (26.0, 40.0),
    "chat": (8.0, 20.0),
    "scan": (28.0, 40.0),
    "bursts": (48.0, 90.0),
}
WARM_UP_SHARE = 1 / 3
MAX_MODEL_LEN = 16_384
HEADING = (
    f"{'workload':10}{'load':11}{'memory':13}{'tokens/s':>9}{'TTFT mean':>11}{'p99 ms':>9}"
    f"{'adapter hits':>14}{'prefix hits':>13}"
)


class Case(NamedTuple):
    workload: str
    load: str
    memory: str
    """A policy of the one pool, or "split N": N % of the pages for adapters, each part by LRU."""
    seed: int


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    options = make_parser(prog).parse_args(argv)
    for name in ("seeds", "jobs", "pool_pages"):
        if getattr(options, name) < 1:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} {getattr(options, name)} is not allowed: 1 or more is")
    if options.duration <= 0:
        raise ValueError(f"--duration {options.duration} is not allowed: it must be above 0")
    for share in options.splits:
        if not 0 < share < 100:
            raise ValueError(f"--splits {share} is not allowed: it must be above 0 and below 100")
    memories = [*POLICIES, *(f"split {share}" for share in options.splits)]
    seeds = range(options.seeds)
    groups = [(w, load, m) for w in options.workloads for load in LOADS for m in memories]
    cases = [Case(*group, seed) for group in groups for seed in seeds]
    figures = {
        "costs": asdict(CostModel()),
        "rates": {name: dict(zip(LOADS, RATES[name], strict=True)) for name in options.workloads},
        "pool_pages": options.pool_pages,
        "duration": options.duration,
        "rows": [],
        "runs": [],
    }
    print(HEADING, flush=True)
    measured = run_all(partial(simulate, options.duration, options.pool_pages), cases, options.jobs)
    for workload, load, memory in groups:
        runs = [next(measured) for _ in seeds]
        row = {"workload": workload, "load": load, "memory": memory} | mean_of(runs)
        figures["rows"].append(row)
        figures["runs"] += [
            {"workload": workload, "load": load, "memory": memory, "seed": seed} | run
            for seed, run in zip(seeds, runs, strict=True)
        ]
        print_row(row)
        path = write_result("eviction_simulated_h100", figures, options.output)
    print(f"written to {path}")
    picture = plot_eviction(
        figures["rows"],
        "Llama-3-8B on a simulated H100, by what is evicted",
        path.with_suffix(".png"),
    )
    if picture is not None:
        print(f"written to {picture}")
    return 0


def make_parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog,
        description="Eviction policies and fixed splits of the memory, with the real scheduler and "
        "pool on a simulated H100: throughput, time to first token and hit rates.",
    )
    parser.add_argument(
        "--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), metavar="NAME",
        help="out of %(choices)s (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--splits", nargs="*", type=int, default=[20, 40], metavar="PERCENT",
        help="shares for adapters to compare with (default: 20 40)",
    )  # fmt: skip
    numbers = [
        ("--seeds", int, 3, "runs of each case"),
        ("--duration", float, 120.0, "simulated seconds of a run"),
        ("--pool-pages", int, 25_600, "pages of 2 MiB in the pool"),
        ("--jobs", int, min(2, os.cpu_count() or 1), "runs at a time"),
    ]
    for flag, kind, default, text in numbers:
        parser.add_argument(
            flag, type=kind, default=default, metavar="N", help=f"{text} (default: %(default)s)"
        )
    parser.add_argument(
        "--output", type=Path, help="JSON file to write; the picture goes beside it"
    )
    return parser


def run_all(
    run: Callable[[Case], dict[str, float]], cases: Iterable[Case], jobs: int
) -> Iterator[dict[str, float]]:
    """What each case came to, in order."""
    if jobs == 1:
        yield from map(run, cases)
        return
    with ProcessPoolExecutor(jobs) as executor:
        yield from executor.map(run, cases)


def simulate(duration: float, pool_pages: int, case: Case) -> dict[str, float]:
    """Serve the case's conversations for so many simulated seconds."""
    device = SimulatedDevice(CostModel(), pool_pages, MAX_MODEL_LEN)
    make_pool: PoolMaker = PagePool
    policy = case.memory
    if case.memory.startswith("split"):
        policy = "lru"
        make_pool = partial(SplitPool, adapter_share=int(case.memory.split()[1]) / 100)
    config = EngineConfig(eviction_policy=policy)
    core = EngineCore(config, lambda config, wake: device, make_pool)
    rate = RATES[case.workload][LOADS.index(case.load)]
    conversations = WORKLOADS[case.workload](rate, duration, case.seed)
    replay = Replay(core, device, conversations)
    replay.run_until(WARM_UP_SHARE * duration)
    before = replay.counters()
    replay.ttfts.clear()
    replay.run_until(duration)
    core.check_integrity()
    grown = {name: value - before[name] for name, value in replay.counters().items()}
    ttft = milliseconds(replay.ttfts) or {}
    num_requests = max(grown["requests"], 1)
    return {
        "tokens_per_second": grown["output_tokens"] / grown["seconds"],
        "requests_per_second": grown["requests"] / grown["seconds"],
        "ttft_mean_ms": ttft.get("mean", np.nan),
        "ttft_p99_ms": ttft.get("p99", np.nan),
        "adapter_hit_rate": 1 - grown["adapter_loads"] / num_requests,
        "prefix_hit_rate": grown["prefix_hit_tokens"] / max(grown["prompt_tokens"], 1),
        "preemptions": grown["preemptions"],
    }


def mean_of(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: round(float(np.mean([run[name] for run in runs])), 4) for name in runs[0]}


def print_row(row: dict[str, Any]) -> None:
    ttfts = f"{row['ttft_mean_ms']:>11.1f}{row['ttft_p99_ms']:>9.0f}"
    # Beyond what can be served the queue grows, and waiting times say how long the run was.
    shown = ttfts if row["load"] == "loaded" else f"{'':20}"
    print(
        f"{row['workload']:10}{row['load']:11}{row['memory']:13}{row['tokens_per_second']:>9.0f}"
        f"{shown}{row['adapter_hit_rate']:>14.3f}{row['prefix_hit_rate']:>13.3f}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
