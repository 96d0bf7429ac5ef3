"""What a request to an adapter that is not on the device costs: itself, and those that run.

So many requests decode, going round adapters of their own, while others arrive at a rate, each to
an adapter of its own, for a few tokens. Three phases, each with new running requests, so that all
see the same growth of their contexts:

    quiet   nothing arrives: the gaps between tokens to compare with
    warm    the arriving requests' adapters are in the pool
    cold    the same arrivals again, with their adapters in host memory only

Before the first phase every adapter is used once, which reads it from disk into host memory, where
all have room, and into the pool, where all have room, too. Before the last one they are pushed out
of the pool as any user could: requests to the base model take every page for their KV, until no
idle adapter is left, and are aborted. The counter adapter_loads must then grow by one for each
request of the cold phase and not at all in the others, or the run fails.

All goes through EngineCore.step in one loop, as in the engine's own process: requests that are due
are added between steps. Time to first token counts from when a request was due.

    python benchmarks/cold_adapters.py --shape llama-3-8b
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from loraplex.benchmarks import core_steps, offline
from loraplex.benchmarks.plots import plot_latencies
from loraplex.benchmarks.results import milliseconds, write_result
from loraplex.engine.config import EngineConfig
from loraplex.engine.core import EngineCore
from loraplex.engine.messages import EngineRequest

COUNTERS = ("steps", "adapter_loads", "adapter_evictions", "preemptions")
PHASES = ("quiet", "warm", "cold")
RUNNING_ADAPTERS = 16
ARRIVING_INPUT_LEN = 32
ARRIVING_OUTPUT_LEN = 16
WARM_UP_STEPS = 8
# Images of adapters that are being read need room beside those that are there.
SPARE_IMAGES = 8
# Adapters with weights of their own; the others are links.
NUM_FILES = 4
HEADING = (
    f"{'phase':8}{'steps':>7}{'loads':>7}{'':3}"
    f"{'ITL p50':>9}{'p99':>9}{'mean':>9}{'max':>9}{'':3}{'TTFT p50':>9}{'p99':>9}{'mean':>9}  (ms)"
)


@dataclass
class Phase:
    """What happened in a phase. Seconds."""

    gaps: list[float] = field(default_factory=list)
    """Between tokens of each running request."""
    ttfts: list[float] = field(default_factory=list)
    """Of each arriving request, from when it was due."""
    counters: dict[str, int] = field(default_factory=dict)
    """How much the engine's COUNTERS grew."""
    seconds: float = 0.0

    def row(self, name: str) -> dict[str, Any]:
        return {
            "phase": name,
            "seconds": round(self.seconds, 3),
            **self.counters,
            "itl_ms": {**(milliseconds(self.gaps) or {}), "max": round(1e3 * max(self.gaps), 3)},
            "ttft_ms": milliseconds(self.ttfts),
        }


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    options = make_parser(prog).parse_args(argv)
    counts = ("num_running", "num_cold", "rank", "running_input_len", "running_output_len")
    for name in counts:
        if getattr(options, name) < 1:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} {getattr(options, name)} is not allowed: 1 or more is")
    if options.rate <= 0:
        raise ValueError(f"--rate {options.rate} is not allowed: it must be above 0")
    defaults = {"max_num_seqs": options.num_running + options.num_cold}
    engine_options = defaults | offline.make_engine_options(options)
    core_steps.require_seqs(engine_options, options.num_running + 1)
    with offline.prepared_model(options, engine_options) as (scratch, model):
        # Imported late: they bring torch.
        from loraplex.benchmarks.synthetic_adapters import write_adapters
        from loraplex.engine.models.registry import lora_spec

        size_memory(options, model, engine_options)
        num_running = min(RUNNING_ADAPTERS, options.num_running)
        adapters = write_adapters(
            scratch / "adapters", lora_spec(model)[0], num_running + options.num_cold, NUM_FILES,
            ranks=[options.rank], modules=options.modules,
        )  # fmt: skip
        config = EngineConfig.from_options(model=model, **engine_options)
        name = options.shape or Path(options.model).name
        figures = {"model": name, "engine_options": engine_options} | {
            key: getattr(options, key) for key in (*counts, "rate", "modules")
        }
        with core_steps.started_core(config) as core:
            bench = ColdBench(core, config, options, adapters[:num_running], adapters[num_running:])
            bench.run(f"cold_adapters_{name}", figures)
    return 0


def make_parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog,
        description="Requests to adapters that are in host memory but not on the device: their "
        "time to first token against that of adapters that are, and the gaps between tokens of "
        "the requests that run meanwhile.",
    )
    offline.add_model_arguments(parser)
    numbers = [
        ("--num-running", int, 64, "requests that decode"),
        ("--num-cold", int, 100, "requests that arrive, each to an adapter of its own"),
        ("--rate", float, 20.0, "of arrivals, in requests per second"),
        ("--rank", int, 16, "of adapters"),
        ("--running-input-len", int, 256, "prompt tokens of a running request"),
        ("--running-output-len", int, 2048, "most tokens that one generates in a phase; sizes the "
         "pool"),
    ]  # fmt: skip
    for flag, kind, default, text in numbers:
        parser.add_argument(
            flag, type=kind, default=default, metavar="N", help=f"{text} (default: %(default)s)"
        )
    parser.add_argument(
        "--modules", nargs="+", metavar="MODULE", help="that adapters target (default: all)"
    )
    offline.add_common_arguments(parser)
    return parser


def size_memory(options: argparse.Namespace, model: str, engine_options: dict[str, Any]) -> None:
    """Set, unless they are given, pool_bytes and host_adapter_bytes to what holds everything."""
    num_pages, page_bytes = offline.adapter_size(
        model, engine_options, options.rank, options.modules
    )
    num_adapters = min(RUNNING_ADAPTERS, options.num_running) + options.num_cold
    block_size = EngineConfig.from_options(**engine_options).block_size

    def kv_pages(num_requests: int, length: int) -> int:
        # And one for each to grow by, without which the scheduler admits nobody.
        return num_requests * (-(-length // block_size) + 1)

    running = kv_pages(options.num_running, options.running_input_len + options.running_output_len)
    arriving = kv_pages(options.num_cold, ARRIVING_INPUT_LEN + ARRIVING_OUTPUT_LEN)
    total = 1 + num_adapters * num_pages + running + arriving
    engine_options.setdefault("pool_bytes", total * page_bytes)
    engine_options.setdefault(
        "host_adapter_bytes", (num_adapters + SPARE_IMAGES) * num_pages * page_bytes
    )


class ColdBench:
    """Runs the phases one after another."""

    def __init__(
        self,
        core: EngineCore,
        config: EngineConfig,
        options: argparse.Namespace,
        running_adapters: list[Path],
        cold_adapters: list[Path],
    ) -> None:
        self.core, self.config, self.options = core, config, options
        self.running_adapters, self.cold_adapters = running_adapters, cold_adapters
        self.prompts = core_steps.Prompts(core.model_info.vocab_size)
        # When requests arrive, in seconds: a Poisson process, the same in all phases.
        gaps = np.random.default_rng(1).exponential(1 / options.rate, len(cold_adapters))
        self.arrival_times = np.cumsum(gaps).tolist()

    def run(self, name: str, figures: dict[str, Any]) -> None:
        """Print a line for each phase and write the results after each. RuntimeError if the
        adapters were not where they should have been."""
        began = time.perf_counter()
        core_steps.load_adapters(
            self.core, self.running_adapters + self.cold_adapters, self.prompts
        )
        print(f"adapters read and loaded in {time.perf_counter() - began:.1f} s", flush=True)
        print(HEADING, flush=True)
        phases: dict[str, Phase] = {}
        figures["phases"] = []
        for phase_name in PHASES:
            if phase_name == "cold":
                self.push_out_adapters()
            phase = phases[phase_name] = self.run_phase(phase_name)
            row = phase.row(phase_name)
            figures["phases"].append(row)
            print_row(row)
            path = write_result(name, figures, self.options.output)
            expected = len(self.cold_adapters) if phase_name == "cold" else 0
            if row["adapter_loads"] != expected:
                raise RuntimeError(
                    f"{row['adapter_loads']} adapters were loaded in the {phase_name} phase, and "
                    f"not {expected}: is pool_bytes too small?"
                )
        print(f"written to {path}")
        picture = plot_latencies(
            {
                "ITL of running requests": {n: phase.gaps for n, phase in phases.items()},
                "TTFT of arriving requests": {n: phases[n].ttfts for n in ("warm", "cold")},
            },
            f"{name}: {len(self.cold_adapters)} arrivals at {self.options.rate}/s",
            path.with_suffix(".png"),
        )
        if picture is not None:
            print(f"written to {picture}")

    def run_phase(self, name: str) -> Phase:
        """RuntimeError if a running request ended before the arrivals did."""
        core, options = self.core, self.options
        running = [
            core_steps.make_request(
                f"{name} running {i}",
                self.prompts.draw(options.running_input_len),
                options.running_output_len,
                self.running_adapters[i % len(self.running_adapters)],
            )
            for i in range(options.num_running)
        ]
        arrivals = deque() if name == "quiet" else self.make_arrivals(name)
        core_steps.start_all(core, running)
        for _ in range(WARM_UP_STEPS):
            core_steps.step(core)
        before = core.stats()
        phase = self.measure(running, arrivals)
        after = core.stats()
        for counter in COUNTERS:
            phase.counters[counter] = after[counter] - before[counter]
        core_steps.end_all(core, (request.request_id for request in running))
        return phase

    def make_arrivals(self, name: str) -> deque[tuple[float, EngineRequest]]:
        return deque(
            (due, core_steps.make_request(f"{name} {index}", self.prompts.draw(ARRIVING_INPUT_LEN),
                               ARRIVING_OUTPUT_LEN, adapter))
            for index, (due, adapter) in enumerate(
                zip(self.arrival_times, self.cold_adapters, strict=True)
            )
        )  # fmt: skip

    def measure(
        self, running: list[EngineRequest], arrivals: deque[tuple[float, EngineRequest]]
    ) -> Phase:
        """Step until all arrivals have come and gone, and as long as they take to come."""
        core, phase = self.core, Phase()
        due_times = {request.request_id: due for due, request in arrivals}
        unfinished = set(due_times)
        now = began = time.perf_counter()
        running_ids = {request.request_id for request in running}
        last_times: dict[str, float] = {}
        while arrivals or unfinished or now - began < self.arrival_times[-1]:
            while arrivals and arrivals[0][0] <= now - began:
                core.add_request(arrivals.popleft()[1])
            outputs = core_steps.step(core)
            now = time.perf_counter()
            for output in outputs:
                request_id = output.request_id
                if request_id in running_ids:
                    if output.finish_reason is not None:
                        raise RuntimeError(
                            f"a running request ended after {self.options.running_output_len} "
                            "tokens, before the arrivals did: raise --running-output-len"
                        )
                    # The first gap began before this did.
                    if request_id in last_times:
                        phase.gaps.append(now - last_times[request_id])
                    last_times[request_id] = now
                    continue
                if request_id in due_times:
                    phase.ttfts.append(now - began - due_times.pop(request_id))
                if output.finish_reason is not None:
                    unfinished.discard(request_id)
        phase.seconds = now - began
        return phase

    def push_out_adapters(self) -> None:
        """Have the base model's KV take the whole pool, until no idle adapter is left in it."""
        core, num_requests = self.core, self.config.max_num_seqs
        most = core.model_info.max_model_len
        began = time.perf_counter()
        tokens = core.stats()["pages_total"] * self.config.block_size
        # As many as may run, that together want a little more than there is.
        length = min(-(-tokens // num_requests) + self.config.block_size, most - 1)
        requests = [
            core_steps.make_request(f"pushing {i}", self.prompts.draw(length), most - length)
            for i in range(num_requests)
        ]
        for request in requests:
            core.add_request(request)
        while core.stats()["pages_adapter_idle"]:
            if not core.has_unfinished_requests():
                raise RuntimeError(
                    "adapters could not be pushed out of the pool: pool_bytes is too large for "
                    f"{num_requests} requests of {most} tokens"
                )
            core_steps.step(core)
        core_steps.end_all(core, (request.request_id for request in requests))
        print(f"adapters pushed out in {time.perf_counter() - began:.1f} s", flush=True)


def print_row(row: dict[str, Any]) -> None:
    itl = "".join(f"{row['itl_ms'][name]:>9.2f}" for name in ("p50", "p99", "mean", "max"))
    ttft = row["ttft_ms"] or {}
    ttfts = "".join(f"{ttft[name]:>9.2f}" for name in ("p50", "p99", "mean") if ttft)
    print(
        f"{row['phase']:8}{row['steps']:>7}{row['adapter_loads']:>7}{'':3}{itl}{'':3}{ttfts}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
