"""What faults of adapters cost: whoever asked for them, and those that run beside.

A core serves steady requests (steady_traffic.py), whose tokens are known, while adapters come from
a hub and an S3 store on this machine that fail as they are told (faults.py). For each fault a quiet
time is measured, then the same with the fault in it; then the fault ends, and its adapter must be
served. Two more rows have no error, and are compared with the same requests to adapters that are
loaded:

    first requests   so many at once for an adapter that is not here
    hot-swapped      so many adapters get new versions while a request for each of them runs

Before and after each, with no request running and its adapters unloaded, pages, host memory, open
files and threads are counted. The stores run in this process: what they take of its interpreter's
time counts as the engine's.

    python benchmarks/adapter_faults.py
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from loraplex.benchmarks import core_steps, offline
from loraplex.benchmarks.results import milliseconds, write_result
from loraplex.benchmarks.steady_traffic import Reply, SteadyTraffic, probe
from loraplex.engine.config import EngineConfig
from loraplex.engine.core import EngineCore
from loraplex.engine.lora_request import LoRARequest

try:
    from loraplex.benchmarks.fake_hub import FakeHub
    from loraplex.benchmarks.faults import FAULTS, Fault, Stores
    from loraplex.benchmarks.faulty_server import FaultyServer
    from loraplex.benchmarks.s3_server import s3_server
except ModuleNotFoundError as error:
    raise ValueError(
        f"the stores of this benchmark need {error.name}: pip install 'loraplex[bench]'"
    ) from None

NUM_SEEDS = 4
PROMPT_LEN = 8
OUTPUT_LEN = 4
RETRY_SECONDS = 0.2
SETTLE_SECONDS = 5.0
COUNTERS = ("adapter_downloads", "adapter_loads")
DEFAULTS = {
    "dtype": "float32",  # In which tokens don't depend on who else is in the batch.
    "max_num_seqs": 64,
    "pool_bytes": 3 << 29,
    "adapter_stall_seconds": 2.0,
    "adapter_fetch_attempts": 3,
    "adapter_retry_seconds": 1.0,
}
HEADING = (
    f"{'fault':26}{'status':>6}{'seconds':>9}{'served again':>13}{'downloads':>10}{'loads':>6}"
    f"{'ITL p99':>9}{'quiet':>8}{'max':>8}{'quiet':>8} ms{'wrong':>6}"
)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    options = make_parser(prog).parse_args(argv)
    engine_options = DEFAULTS | offline.make_engine_options(options)
    # moto's store takes any; with others in their place this engine would sign with those.
    os.environ |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    with offline.prepared_model(options, engine_options) as (scratch, model):
        # Imported late: they bring torch.
        from loraplex.benchmarks.synthetic_adapters import write_adapter
        from loraplex.engine.models.registry import lora_spec

        adapters = [
            write_adapter(scratch / f"seed-{seed}", lora_spec(model)[0], options.rank,
                          modules=options.modules, seed=seed)
            for seed in range(NUM_SEEDS)
        ]  # fmt: skip
        files = {path.name: path.read_bytes() for path in adapters[0].iterdir()}
        hub, name = FakeHub(), options.shape or Path(options.model).name
        figures = {"model": name, "engine_options": dict(engine_options)} | {
            key: getattr(options, key)
            for key in ("rank", "modules", "num_running", "num_first", "num_swapped")
        }
        with FaultyServer(hub) as hub_server, s3_server({"silent": files}) as s3:
            stores = Stores(hub, hub_server, s3, scratch, files)
            config = EngineConfig.from_options(
                model=model,
                adapter_cache_directory=str(scratch / "cache"),
                adapter_hub_endpoint=hub_server.url,
                adapter_s3_endpoint_url=s3.url,
                **engine_options,
            )
            with core_steps.started_core(config) as core:
                FaultBench(core, stores, adapters, options).run(figures)
    return 0


def make_parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog,
        description="Faults of adapters: time to the error, what it costs the requests that run "
        "beside it, and what is left of it.",
    )
    offline.add_model_arguments(parser)
    numbers = [
        ("--num-running", 8, "steady requests"),
        ("--num-first", 500, "first requests at once for one adapter"),
        ("--num-swapped", 200, "adapters that get new versions"),
        ("--rank", 8, "of adapters"),
    ]
    for flag, default, text in numbers:
        parser.add_argument(
            flag, type=int, default=default, metavar="N", help=f"{text} (default: %(default)s)"
        )
    parser.add_argument(
        "--modules", nargs="+", default=["q_proj", "v_proj"], metavar="MODULE",
        help="that adapters target (default: q_proj v_proj)",
    )  # fmt: skip
    parser.add_argument(
        "--quiet-seconds", type=float, default=10.0, metavar="SECONDS",
        help="time measured without a fault, and least with it (default: %(default)s)",
    )  # fmt: skip
    offline.add_common_arguments(parser)
    return parser


class FaultBench:
    """Runs faults one after another."""

    def __init__(
        self,
        core: EngineCore,
        stores: Stores,
        adapters: Sequence[Path],
        options: argparse.Namespace,
    ) -> None:
        """adapters: of different weights; the first has those of the stores."""
        self.core, self.stores, self.adapters, self.options = core, stores, adapters, options
        self.prompt = core_steps.Prompts(core.model_info.vocab_size).draw(PROMPT_LEN)
        self.traffic = SteadyTraffic(core, adapters, options.num_running)
        self.expected = [
            self.traffic.send([self.request(LoRARequest("alone", str(path)), i)])[0].tokens
            for i, path in enumerate(adapters)
        ]

    def run(self, figures: dict[str, Any]) -> None:
        """Print a line for each fault and write the results after each. RuntimeError if anything
        wrong was served, or pages or host memory are not given back."""
        self.warm_up()
        print(HEADING, flush=True)
        rows = figures["rows"] = []
        measures = [partial(self.measure_fault, *item) for item in FAULTS.items()]
        for measure in [*measures, self.measure_first_requests, self.measure_swap]:
            for row in measure():
                rows.append(row)
                print_row(row)
                path = write_result("adapter_faults", figures, self.options.output)
        print(f"written to {path}")
        wrong = [row["fault"] for row in rows if row["wrong"]]
        leaks = [row["fault"] for row in rows if leak_of(row)]
        if wrong or leaks:
            raise RuntimeError(f"wrong tokens served in {wrong}; memory not given back in {leaks}")

    def request(self, lora: LoRARequest, number: int = 0) -> Any:
        return probe(f"{lora.lora_name} {number}", self.prompt, lora, OUTPUT_LEN)

    def warm_up(self) -> None:
        """What the first fetch from a store brings along is no fault's."""
        self.stores.hub.add("bench/warm", self.stores.files)
        loras = [LoRARequest("warm", path) for path in ("hub:bench/warm", "s3://adapters/silent")]
        for number, lora in enumerate(loras):
            self.traffic.run([self.request(lora, number)])
            self.forget([lora])

    def measure_fault(self, name: str, fault: Fault) -> Iterator[dict[str, Any]]:
        quiet, begin = self.quiet_gaps(), self.begin()
        with fault(self.stores) as lora:
            (reply,) = self.traffic.run([self.request(lora)], self.options.quiet_seconds)
            gaps = self.take_gaps()
        if reply.error is None:
            raise RuntimeError(f"{name}: the request was served, with {reply.tokens}")
        recovered, num_wrong = self.recover(lora)
        self.forget([lora])
        yield self.end(name, begin, gaps, quiet, num_wrong) | {
            "seconds": round(reply.seconds or 0.0, 3),
            "status": reply.status,
            "error": reply.error.replace(str(self.stores.directory), "DIRECTORY"),
            "seconds_until_served": round(recovered, 3),
        }

    def measure_first_requests(self) -> Iterator[dict[str, Any]]:
        """And the same requests again, when the adapter is loaded."""
        self.stores.hub.add("bench/crowd", self.stores.files)
        lora, begin = LoRARequest("crowd", "hub:bench/crowd"), self.begin()
        requests = [self.request(lora, i) for i in range(self.options.num_first)]
        first = self.traffic.run(requests)
        gaps = self.take_gaps()
        again = self.traffic.run(requests)
        quiet = self.take_gaps()
        num_wrong = sum(reply.tokens != self.expected[0] for reply in first + again)
        self.forget([lora])
        row = self.end(f"{len(requests)} first requests", begin, gaps, quiet, num_wrong)
        yield row | {"seconds": last_end(first), "seconds_again": last_end(again)}

    def measure_swap(self) -> Iterator[dict[str, Any]]:
        """Links are turned to other directories and refreshed, while there is a request for each;
        compared with the same requests before."""
        begin = self.begin()
        num_adapters = self.options.num_swapped
        links = [self.stores.directory / f"link-{i}" for i in range(num_adapters)]
        loras = [LoRARequest(f"swap-{i}", str(link)) for i, link in enumerate(links)]
        requests = [self.request(lora) for lora in loras]
        self.turn(links, 0)
        self.traffic.run(requests)
        self.take_gaps()
        self.traffic.run(requests)
        quiet = self.take_gaps()
        self.turn(links, 1)
        began, ends = time.perf_counter(), list[float]()
        refreshes = [self.core.refresh_adapter(lora) for lora in loras]
        for refresh in refreshes:
            refresh.add_done_callback(lambda _: ends.append(time.perf_counter() - began))
        during = self.traffic.run(requests)
        gaps = self.take_gaps()
        self.traffic.drain()
        if not all(refresh.result()["changed"] for refresh in refreshes):
            raise RuntimeError("an adapter that was changed is said not to be")
        after = self.traffic.run(requests)
        old = [self.expected[i % NUM_SEEDS] for i in range(num_adapters)]
        new = [self.expected[(i + 1) % NUM_SEEDS] for i in range(num_adapters)]
        num_wrong = sum(r.tokens not in pair for r, *pair in zip(during, old, new, strict=True))
        num_wrong += sum(reply.tokens != tokens for reply, tokens in zip(after, new, strict=True))
        self.forget(loras)
        row = self.end(f"{num_adapters} hot-swapped", begin, gaps, quiet, num_wrong)
        yield row | {"seconds": round(max(ends), 3), "swap_ms": milliseconds(ends)}

    def turn(self, links: Sequence[Path], version: int) -> None:
        """Point each at a directory of its own with this version's weights."""
        for i, link in enumerate(links):
            directory = link.with_name(f"{link.name}-{version}")
            directory.mkdir()
            for file in self.adapters[(i + version) % NUM_SEEDS].iterdir():
                (directory / file.name).hardlink_to(file)
            temporary = link.with_suffix(".new")
            temporary.symlink_to(directory)
            temporary.rename(link)

    def recover(self, lora: LoRARequest) -> tuple[float, int]:
        """Ask until the adapter is served: the seconds, and whether its tokens are wrong."""
        began = time.perf_counter()
        while True:
            (reply,) = self.traffic.run([self.request(lora)])
            if reply.error is None:
                return time.perf_counter() - began, reply.tokens != self.expected[0]
            self.traffic.run(seconds=RETRY_SECONDS)

    def forget(self, loras: Sequence[LoRARequest]) -> None:
        self.traffic.drain()
        for lora in loras:
            self.core.unload_adapter(lora, delete_files=True)
        self.traffic.drain()

    def quiet_gaps(self) -> list[float]:
        self.take_gaps()
        self.traffic.run(seconds=self.options.quiet_seconds)
        return self.take_gaps()

    def take_gaps(self) -> list[float]:
        gaps, self.traffic.gaps = self.traffic.gaps, []
        return gaps

    def begin(self) -> dict[str, Any]:
        """The state of things before a fault."""
        self.traffic.drain()
        self.take_gaps()
        self.traffic.num_finished = self.traffic.num_wrong = 0
        return self.state()

    def end(
        self,
        name: str,
        before: dict[str, Any],
        gaps: list[float],
        quiet: list[float],
        num_wrong: int,
    ) -> dict[str, Any]:
        """A row, with the state of things after it; checks the engine's books."""
        self.traffic.drain()
        self.core.check_integrity()
        end = time.perf_counter() + SETTLE_SECONDS
        # Threads may still be deleting what was downloaded.
        while (after := self.state())["open_files"] > before["open_files"]:
            if time.perf_counter() > end:
                break
            time.sleep(RETRY_SECONDS)
        return {
            "fault": name,
            "itl_ms": gap_figures(gaps),
            "quiet_itl_ms": gap_figures(quiet),
            "num_steady": self.traffic.num_finished,
            "wrong": num_wrong + self.traffic.num_wrong,
            **{name: after.pop(name) - before.pop(name) for name in COUNTERS},
            "before": before,
            "after": after,
        }

    def state(self) -> dict[str, Any]:
        """With no request running."""
        stats = self.core.stats()
        names = ("pages_free", "pages_kv", "pages_kv_cached", "pages_adapter",
                 "pages_adapter_idle", "host_adapter_bytes")  # fmt: skip
        files = [open_file(name) for name in os.listdir("/proc/self/fd")]
        return {
            **{name: stats[name] for name in (*COUNTERS, *names)},
            "open_files": sum(file.startswith("/") for file in files),
            "sockets": sum(file.startswith("socket:") for file in files),
            "threads": threading.active_count(),
        }


def open_file(descriptor: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except FileNotFoundError:
        return ""


def gap_figures(gaps: list[float]) -> dict[str, float]:
    return {**(milliseconds(gaps) or {}), "max": round(1e3 * max(gaps, default=0.0), 3)}


def last_end(replies: Sequence[Reply]) -> float:
    """Seconds until all were served."""
    return round(max(reply.seconds or 0.0 for reply in replies), 3)


def leak_of(row: dict[str, Any]) -> int:
    """Pages and bytes of host memory that are gone."""
    names = ("pages_free", "pages_kv", "host_adapter_bytes")
    return sum(abs(row["after"][name] - row["before"][name]) for name in names)


def print_row(row: dict[str, Any]) -> None:
    itl, quiet = row["itl_ms"], row["quiet_itl_ms"]
    print(
        f"{row['fault']:26}{row.get('status', ''):>6}{row['seconds']:>9.2f}"
        f"{row.get('seconds_until_served', 0.0):>13.2f}{row['adapter_downloads']:>10}"
        f"{row['adapter_loads']:>6}{itl['p99']:>9.1f}{quiet['p99']:>8.1f}{itl['max']:>8.1f}"
        f"{quiet['max']:>8.1f}   {row['wrong']:>6}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
