"""The time of a decode step of the whole engine, by batch, distinct adapters and rank, against the
bytes that it must read.

One engine with random weights serves all cases. In each, so many requests with prompts of their own
go round so many adapters, which were loaded before; once all of them decode, steps are timed in
which nothing else happens, and that is checked. The time is that of EngineCore.step: scheduling,
the device's work and taking in its tokens, the device a step ahead as in service. The floor is

    (weights + adapters * rank * rank_bytes + batch * (context + 1) * kv_bytes) / bandwidth

with the mean context of the timed steps. The base model is measured before the first adapter is
loaded and again behind all of them: what adapters that nobody uses cost.

    python benchmarks/decode_step.py --shape llama-3-8b
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from loraplex.benchmarks import ceilings, core_steps, offline
from loraplex.benchmarks.plots import plot_decode
from loraplex.benchmarks.results import write_result
from loraplex.benchmarks.roofline import DecodeBytes, adapter_counts
from loraplex.engine.config import EngineConfig
from loraplex.engine.core import EngineCore

BATCHES = [64, 256, 16, 128, 1]
ADAPTERS = [0, 16, "batch", 64, 1]
RANKS = [16, 8, 64]
MAX_NUM_BATCHED_TOKENS = 8192
WARM_UP_STEPS = 8
# Adapters of a rank with weights of their own; the others are links.
NUM_FILES = 2
HEADING = (
    f"{'batch':>6}{'adapters':>9}{'rank':>5}{'context':>9}{'ms':>9}{'median':>9}{'floor':>9}"
    f"{'share':>7}{'of base':>8}{'elapsed':>9}"
)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    options = make_parser(prog).parse_args(argv)
    if min(*options.batch, *options.ranks, options.context, options.steps) < 1:
        raise ValueError("--batch, --ranks, --context and --steps must be 1 or more")
    engine_options = {
        "max_num_seqs": max(options.batch),
        "max_num_batched_tokens": max(MAX_NUM_BATCHED_TOKENS, *options.batch),
    } | offline.make_engine_options(options)
    core_steps.require_seqs(engine_options, max(options.batch))
    bandwidth = ceilings.resolve_ceilings(options, engine_options).bandwidth
    if bandwidth is None:
        raise ValueError(
            "--bandwidth=None is not allowed on the CPU: give its memory's, in TB/s, as in 0.02"
        )
    name = options.shape or Path(options.model).name
    with offline.prepared_model(options, engine_options) as (scratch, model):
        adapters = write_adapters_of_ranks(options, model, scratch)
        config = EngineConfig.from_options(model=model, **engine_options)
        with core_steps.started_core(config) as core:
            bench = DecodeBench(core, config, options, bandwidth, adapters)
            figures = {"model": name, "engine_options": engine_options} | bench.settings()
            return bench.run(f"decode_step_{name}", figures)


def make_parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog,
        description="The time of a decode step of the whole engine by batch, distinct adapters and "
        "rank, against the bytes that it must read. What is named first is measured first.",
    )
    offline.add_model_arguments(parser)
    parser.add_argument(
        "--batch", type=int, nargs="+", default=BATCHES, metavar="B",
        help="requests that decode (default: 64 256 16 128 1)",
    )  # fmt: skip
    parser.add_argument(
        "--adapters", type=_adapter_count, nargs="+", default=ADAPTERS, metavar="A",
        help="distinct adapters among them: a number, or `batch` for one each; larger ones than a "
        "batch are left out, and 0, the base model, is always measured (default: 0 16 batch 64 1)",
    )  # fmt: skip
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=RANKS, metavar="R",
        help="of adapters (default: 16 8 64)",
    )  # fmt: skip
    parser.add_argument(
        "--modules", nargs="+", metavar="MODULE", help="that adapters target (default: all)"
    )
    parser.add_argument(
        "--context", type=int, default=512, metavar="N",
        help="tokens of each prompt, at random (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=int, default=64, metavar="N", help="to time (default: %(default)s)"
    )
    ceilings.add_bandwidth_argument(parser)
    offline.add_common_arguments(parser)
    return parser


def _adapter_count(text: str) -> int | str:
    if text == "batch":
        return text
    if text.isdecimal():
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not allowed: it must be a number or 'batch'")


def write_adapters_of_ranks(
    options: argparse.Namespace, model: str, directory: Path
) -> dict[int, list[Path]]:
    """As many of each rank as the largest batch can use. ValueError for an unknown module."""
    from loraplex.benchmarks.synthetic_adapters import write_adapters
    from loraplex.engine.models.registry import lora_spec

    counts = [n for batch in options.batch for n in adapter_counts(batch, options.adapters)]
    most, spec = max(counts, default=0), lora_spec(model)[0]
    return {
        rank: write_adapters(
            directory / f"r{rank}", spec, most, NUM_FILES, ranks=[rank], modules=options.modules
        )
        for rank in options.ranks
    }


class DecodeBench:
    """Measures cases one after another, on a core that has seen no adapter."""

    def __init__(
        self,
        core: EngineCore,
        config: EngineConfig,
        options: argparse.Namespace,
        bandwidth: float,
        adapters: dict[int, list[Path]],
    ) -> None:
        """bandwidth: bytes a second. adapters: directories by rank."""
        from loraplex.engine.models.config import (
            read_model_config,
            resolve_dtype,
            resolve_kv_dtype,
        )
        from loraplex.engine.models.locate import locate_model

        hf_config = read_model_config(locate_model(config.model))
        dtype = resolve_dtype(config.dtype, hf_config)
        kv_dtype = resolve_kv_dtype(config.kv_cache_dtype, dtype)
        self.bytes = DecodeBytes.of_model(
            hf_config, dtype.itemsize, options.modules, kv_dtype.itemsize
        )
        self.core, self.config, self.options = core, config, options
        self.bandwidth, self.adapters = bandwidth, adapters
        self.prompts = core_steps.Prompts(core.model_info.vocab_size)
        self.began = time.perf_counter()
        self.base_ms: dict[int, float] = {}

    def settings(self) -> dict[str, Any]:
        return {
            "context": self.options.context,
            "steps": self.options.steps,
            "modules": self.options.modules,
            "bandwidth_terabytes_per_second": self.bandwidth / 1e12,
            "bytes": asdict(self.bytes),
        }

    def run(self, name: str, figures: dict[str, Any]) -> int:
        """Measure all cases, print a line for each and write the results after each: 0, or 1 if a
        case failed."""
        rows: list[dict[str, Any]] = []
        others: dict[str, list] = {"left_out": [], "failed": [], "base_behind_adapters": []}
        figures |= {"rows": rows, **others}
        print(HEADING, flush=True)
        for batch, num_adapters, rank in self.cases():
            case = {"batch": batch, "adapters": num_adapters, "rank": rank}
            reason = self.why_not(batch, num_adapters, rank)
            kind = "left_out"
            if reason is None:
                try:
                    row = case | self.measure(batch, num_adapters, rank)
                except RuntimeError as error:
                    reason, kind = str(error), "failed"
            if reason is not None:
                others[kind].append({**case, "reason": reason})
                label = kind.replace("_", " ")
                print(f"{batch:>6}{num_adapters:>9}{rank:>5}  {label}: {reason}", flush=True)
            else:
                rows.append(row)
                self.compare_with_base(row)
                self.print_row(row)
            write_result(name, figures, self.options.output)
        for batch in self.base_ms:
            others["base_behind_adapters"].append(self.measure_base_again(batch))
            write_result(name, figures, self.options.output)
        path = write_result(name, figures, self.options.output)
        print(f"written to {path}")
        title = f"{name}: share of the floor at {self.bandwidth / 1e12} TB/s"
        picture = plot_decode(rows, title, path.with_suffix(".png"))
        if picture is not None:
            print(f"written to {picture}")
        return 1 if others["failed"] else 0

    def cases(self) -> Iterator[tuple[int, int, int]]:
        """(batch, adapters, rank), those of the base model first, which have rank 0."""
        for batch in self.options.batch:
            yield batch, 0, 0
        for rank in self.options.ranks:
            for batch in self.options.batch:
                for count in adapter_counts(batch, self.options.adapters):
                    if count:
                        yield batch, count, rank

    def most_tokens(self, batch: int) -> int:
        """That a request of a case will have generated: some decode while others prefill."""
        per_step = max(self.config.max_num_batched_tokens - batch, 1)
        prefill_steps = -(-batch * self.options.context // per_step) + 1
        return prefill_steps + WARM_UP_STEPS + self.options.steps + 2

    def why_not(self, batch: int, num_adapters: int, rank: int) -> str | None:
        """Why the case cannot run in this pool, in words; None if it can."""
        length = self.options.context + self.most_tokens(batch)
        most = self.core.model_info.max_model_len
        if length > most:
            return f"requests grow to {length} tokens, and max_model_len is {most}"
        of_adapters = 0
        if num_adapters:
            options = {
                name: getattr(self.config, name)
                for name in ("dtype", "kv_cache_dtype", "block_size")
            }
            size, _ = offline.adapter_size(self.config.model, options, rank, self.options.modules)
            of_adapters = num_adapters * size
        # And one for each to grow by, without which the scheduler admits nobody.
        of_kv = batch * (-(-length // self.config.block_size) + 1)
        total = self.core.stats()["pages_total"]
        if of_adapters + of_kv <= total:
            return None
        return f"adapters take {of_adapters} pages and KV {of_kv}, and the pool has {total}"

    def measure(self, batch: int, num_adapters: int, rank: int) -> dict[str, Any]:
        """The row of a case. RuntimeError if the timed steps were not all decode steps of all."""
        core, options = self.core, self.options
        adapters = self.adapters[rank][:num_adapters] if num_adapters else []
        core_steps.load_adapters(core, adapters, self.prompts)
        requests = [
            core_steps.make_request(
                f"{rank}/{num_adapters}/{i}",
                self.prompts.draw(options.context),
                core.model_info.max_model_len - options.context,
                adapters[i % num_adapters] if adapters else None,
            )
            for i in range(batch)
        ]
        try:
            num_tokens = core_steps.start_all(core, requests)
            before = core.stats()
            times = self.time_steps(batch)
            after = core.stats()
        finally:
            core_steps.end_all(core, (request.request_id for request in requests))
        expected = {"steps": WARM_UP_STEPS + options.steps, "adapter_loads": 0, "preemptions": 0}
        for name, value in expected.items():
            if after[name] - before[name] != value:
                raise RuntimeError(
                    f"the timed steps are not of decoding alone: {name} grew by "
                    f"{after[name] - before[name]} and not by {value}"
                )
        # A request with n tokens has n - 1 of them in its context, the last of which is new.
        so_far = num_tokens.total() / batch + WARM_UP_STEPS
        context = options.context + so_far + (options.steps + 1) / 2 - 2
        num_bytes = self.bytes.step(batch, num_adapters, rank, context)
        mean_ms = 1e3 * sum(times) / len(times)
        return {
            "mean_context": round(context, 1),
            "ms": round(mean_ms, 4),
            "median_ms": round(1e3 * median(times), 4),
            "max_ms": round(1e3 * max(times), 4),
            "floor_ms": round(1e3 * num_bytes / self.bandwidth, 4),
            "share": round(1e3 * num_bytes / self.bandwidth / mean_ms, 4),
            "bytes": round(num_bytes),
        }

    def compare_with_base(self, row: dict[str, Any]) -> None:
        if row["adapters"] == 0:
            self.base_ms[row["batch"]] = row["ms"]
        # A base that failed leaves nothing to compare with.
        base_ms = self.base_ms.get(row["batch"])
        row["of_base"] = None if base_ms is None else round(base_ms / row["ms"], 4)

    def measure_base_again(self, batch: int) -> dict[str, Any]:
        """The base model's step with adapters in the pool against the one without."""
        before_ms, after_ms = self.base_ms[batch], self.measure(batch, 0, 0)["ms"]
        resident = self.core.stats()["num_adapters_resident"]
        print(
            f"batch {batch} without adapters: {before_ms:.3f} ms before any was loaded, "
            f"{after_ms:.3f} ms with {resident} in the pool, {after_ms / before_ms:.4f} of that",
            flush=True,
        )
        return {
            "batch": batch,
            "before_ms": before_ms,
            "after_ms": after_ms,
            "ratio": round(after_ms / before_ms, 4),
            "adapters_resident": resident,
        }

    def time_steps(self, batch: int) -> list[float]:
        """Seconds of each timed step, from one's tokens to the next one's."""
        times, last = [], 0.0
        for index in range(WARM_UP_STEPS + self.options.steps):
            outputs = self.core.step()
            now = time.perf_counter()
            if len(outputs) != batch or not all(len(o.new_token_ids) == 1 for o in outputs):
                raise RuntimeError(f"{len(outputs)} of {batch} requests got a token in a step")
            if index >= WARM_UP_STEPS:
                times.append(now - last)
            last = now
        return times

    def print_row(self, row: dict[str, Any]) -> None:
        of_base = "-" if row["of_base"] is None else f"{row['of_base']:.3f}"
        print(
            f"{row['batch']:>6}{row['adapters']:>9}{row['rank']:>5}{row['mean_context']:>9.1f}"
            f"{row['ms']:>9.3f}{row['median_ms']:>9.3f}{row['floor_ms']:>9.3f}{row['share']:>7.1%}"
            f"{of_base:>8}{time.perf_counter() - self.began:>7.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
