"""Eviction policies against each other and against a fixed split of the memory.

The real EngineCore, with its scheduler, pool, KV manager and adapter manager, serves conversations
(conversations.py), each workload at two rates:

    loaded      just below what the device can serve: times to first token
    saturated   above that: throughput

The first third, in which the pool fills and policies learn, is left out. All configurations see the
same conversations; a next turn comes so long after the answer before, so that a slow answer delays
it.

Without a model the device is a simulated H100 with Llama-3-8B (simulated_device.py). With --model
or --shape it is the real engine in real time: one device serves all cases, each by a core and a
pool of its own, and all adapters are in host memory before the first case.

Workloads are made for a pool of FULL_POOL_PAGES. In a smaller one there are as much fewer adapters,
and pauses are as much shorter, so that a shorter run sees the same; what runs at once takes the
same pages, though, and --engine-option max_num_seqs should go down with it.

    python benchmarks/eviction.py
    python benchmarks/eviction.py --shape llama-3-8b --loads saturated --seeds 1 --splits 20
        --workloads zipf chat --pool-pages 12800 --duration 26 --engine-option max_num_seqs=128

The first takes ten minutes on two cores; the second, in real time, one for every two cases.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from loraplex.benchmarks import core_steps, offline
from loraplex.benchmarks.conversations import WORKLOADS, Conversation, Traffic, fit_in
from loraplex.benchmarks.plots import plot_eviction
from loraplex.benchmarks.replay import Replay, WallClock
from loraplex.benchmarks.results import milliseconds, write_result
from loraplex.benchmarks.simulated_device import CostModel, SimulatedDevice
from loraplex.benchmarks.split_pool import SplitPool
from loraplex.benchmarks.workloads import LLAMA_3_VOCAB_SIZE
from loraplex.engine.config import EngineConfig
from loraplex.engine.core import Device, EngineCore, PoolMaker, build_device
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
FULL_POOL_PAGES = 25_600
ADAPTER_RANK = 16
NUM_FILES = 4  # Adapters with weights of their own; the others are links.
# Images of adapters that are being read need room beside those that are there.
SPARE_IMAGES = 8
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


@dataclass(frozen=True)
class Setting:
    """What all cases have in common."""

    duration: float
    pool_pages: int
    rate_factor: float
    engine_options: dict[str, Any]
    vocab_size: int = LLAMA_3_VOCAB_SIZE

    def conversations(self, case: Case, max_model_len: int) -> list[Conversation]:
        traffic = Traffic(
            self.rate_factor * RATES[case.workload][LOADS.index(case.load)],
            self.duration,
            case.seed,
            self.pool_pages / FULL_POOL_PAGES,
            self.vocab_size,
        )
        return fit_in(WORKLOADS[case.workload](traffic), max_model_len)

    def config(self, case: Case) -> EngineConfig:
        policy = "lru" if case.memory.startswith("split") else case.memory
        return EngineConfig.from_options(**self.engine_options, eviction_policy=policy)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    options = make_parser(prog).parse_args(argv)
    check(options)
    memories = [*POLICIES, *(f"split {share}" for share in options.splits)]
    cases = [
        Case(workload, load, memory, seed)
        for workload in options.workloads
        for load in options.loads
        for memory in memories
        for seed in range(options.seeds)
    ]
    engine_options = make_engine_options(options)
    setting = Setting(options.duration, options.pool_pages, options.rate_factor, engine_options)
    figures: dict[str, Any] = {
        "rates": {name: dict(zip(LOADS, RATES[name], strict=True)) for name in options.workloads},
        **asdict(setting),
        "rows": [],
        "runs": [],
    }
    if options.model is None and options.shape is None:
        figures["costs"] = asdict(CostModel())
        measured = run_all(partial(simulate, setting), cases, options.jobs)
        report(cases, measured, "simulated_h100", figures, options.output)
        return 0
    name = options.shape or Path(options.model).name
    with offline.prepared_model(options, engine_options) as (scratch, model):
        setting, adapters = prepare(setting, cases, model, scratch)
        figures |= asdict(setting) | {"model": name, "num_adapters": len(adapters)}
        real = RealDevice(setting, adapters)
        config = EngineConfig.from_options(model=model, **setting.engine_options)
        with core_steps.started_core(config, real.build) as core:
            core_steps.load_adapters(core, adapters, core_steps.Prompts(setting.vocab_size))
            num_held = core.stats()["host_adapters"]
            print(f"{num_held} of {len(adapters)} adapters in host memory", flush=True)
            report(cases, map(real.serve, cases), name, figures, options.output)
    return 0


def check(options: argparse.Namespace) -> None:
    """Raises ValueError for a flag whose value is not allowed."""
    for name in ("seeds", "jobs", "pool_pages"):
        if getattr(options, name) < 1:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} {getattr(options, name)} is not allowed: 1 or more is")
    for name in ("duration", "rate_factor"):
        if getattr(options, name) <= 0:
            flag = name.replace("_", "-")
            raise ValueError(
                f"--{flag} {getattr(options, name)} is not allowed: it must be above 0"
            )
    for share in options.splits:
        if not 0 < share < 100:
            raise ValueError(f"--splits {share} is not allowed: it must be above 0 and below 100")


def make_engine_options(options: argparse.Namespace) -> dict[str, Any]:
    """Raises ValueError for an --engine-option that is none, or that cases set themselves."""
    engine_options = dict(offline.parse_engine_option(text) for text in options.engine_option)
    for name, by in {"eviction_policy": "each case", "pool_bytes": "--pool-pages"}.items():
        if name in engine_options:
            raise ValueError(f"--engine-option {name} is not allowed: {by} sets it")
    EngineConfig.from_options(**engine_options)
    return engine_options


def report(
    cases: Sequence[Case],
    measured: Iterator[dict[str, float]],
    name: str,
    figures: dict[str, Any],
    output: Path | None,
) -> None:
    """Print a line for each case, of all its seeds, and write the results after each."""
    print(HEADING, flush=True)
    for key, of in groupby(cases, key=lambda case: case[:3]):
        group = dict(zip(("workload", "load", "memory"), key, strict=True))
        runs = []
        for case in of:
            runs.append(next(measured))
            figures["runs"].append({**group, "seed": case.seed, **runs[-1]})
        row = {**group, **mean_of(runs)}
        figures["rows"].append(row)
        print_row(row)
        path = write_result(f"eviction_{name}", figures, output)
    print(f"written to {path}")
    picture = plot_eviction(
        figures["rows"],
        f"{name.replace('_', ' ')}, by what is evicted",
        path.with_suffix(".png"),
    )
    if picture is not None:
        print(f"written to {picture}")


def make_parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog,
        description="Eviction policies and fixed splits of the memory, with the real scheduler and "
        "pool on a simulated H100 or, with --model or --shape, on this machine: throughput, time "
        "to first token and hit rates.",
    )
    offline.add_model_arguments(parser)
    parser.set_defaults(model=None)
    parser.add_argument(
        "--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), metavar="NAME",
        help="out of %(choices)s (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--loads", nargs="+", choices=LOADS, default=list(LOADS), metavar="NAME",
        help="out of %(choices)s (default: both)",
    )  # fmt: skip
    parser.add_argument(
        "--splits", nargs="*", type=int, default=[20, 40], metavar="PERCENT",
        help="shares for adapters to compare with (default: 20 40)",
    )  # fmt: skip
    numbers = [
        ("--seeds", int, 3, "runs of each case"),
        ("--duration", float, 120.0, "seconds of a run"),
        ("--pool-pages", int, FULL_POOL_PAGES, "pages in the pool, of 2 MiB with Llama-3-8B; "
         "numbers of adapters and pauses go by it"),
        ("--rate-factor", float, 1.0, "of the rates, for what is not as fast as an H100"),
        ("--jobs", int, min(2, os.cpu_count() or 1), "simulated runs at a time"),
    ]  # fmt: skip
    for flag, kind, default, text in numbers:
        parser.add_argument(
            flag, type=kind, default=default, metavar="N", help=f"{text} (default: %(default)s)"
        )
    offline.add_common_arguments(parser)
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


def simulate(setting: Setting, case: Case) -> dict[str, float]:
    """Serve the case's conversations in simulated time."""
    device = SimulatedDevice(CostModel(), setting.pool_pages, MAX_MODEL_LEN)
    core = EngineCore(setting.config(case), lambda config, wake: device, pool_maker(case))
    conversations = setting.conversations(case, MAX_MODEL_LEN)
    return measure(Replay(core, device, conversations), core, setting.duration)


def pool_maker(case: Case) -> PoolMaker:
    if case.memory.startswith("split"):
        return partial(SplitPool, adapter_share=int(case.memory.split()[1]) / 100)
    return PagePool


def prepare(
    setting: Setting, cases: Iterable[Case], model: str, scratch: Path
) -> tuple[Setting, list[Path]]:
    """The setting for this model, whose engine options have the memory that it takes, and adapters
    for all cases, which are written."""
    from loraplex.benchmarks.synthetic_adapters import write_adapters
    from loraplex.engine.models.registry import lora_spec

    num_pages, page_bytes = offline.adapter_size(
        model, setting.engine_options, ADAPTER_RANK, offline.ATTENTION
    )
    setting = replace(setting, vocab_size=offline.read_vocab_size(model))
    # Whatever length fits: it is the number of adapters that is wanted.
    num_adapters = 1 + max(
        conversation.adapter
        for case in cases
        for conversation in setting.conversations(case, MAX_MODEL_LEN)
    )
    memory = {
        "pool_bytes": setting.pool_pages * page_bytes,
        "host_adapter_bytes": (num_adapters + SPARE_IMAGES) * num_pages * page_bytes,
        "skip_tokenizer_init": True,
    }
    adapters = write_adapters(
        scratch / "adapters", lora_spec(model)[0], num_adapters, NUM_FILES,
        ranks=[ADAPTER_RANK], modules=offline.ATTENTION,
    )  # fmt: skip
    return replace(setting, engine_options=memory | setting.engine_options), adapters


class RealDevice:
    """A device that serves one core after another, each with a new pool over the same memory."""

    def __init__(self, setting: Setting, adapters: Sequence[Path]) -> None:
        self._setting, self._adapters = setting, adapters
        self._device: Device | None = None
        self._wake: Callable[[], None] = lambda: None

    def build(self, config: EngineConfig, wake: Callable[[], None]) -> Device:
        """See loraplex.engine.core.DeviceBuilder: the one device, which wakes its newest core."""
        self._wake = wake
        if self._device is None:
            self._device = build_device(config, lambda: self._wake())
        return self._device

    def serve(self, case: Case) -> dict[str, float]:
        """Serve the case's conversations in real time."""
        core = EngineCore(self._setting.config(case), self.build, pool_maker(case))
        conversations = self._setting.conversations(case, core.model_info.max_model_len)
        replay = Replay(core, WallClock(core), conversations, lambda i: str(self._adapters[i]))
        figures = measure(replay, core, self._setting.duration)
        replay.end()
        return figures


def measure(replay: Replay, core: EngineCore, duration: float) -> dict[str, float]:
    """Serve for so many seconds, and say what happened after the warm-up."""
    replay.run_until(WARM_UP_SHARE * duration)
    before = replay.counters()
    replay.ttfts.clear()
    replay.run_until(duration)
    after = replay.counters()
    core.check_integrity()
    grown = {name: after[name] - before[name] for name in before}
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
