"""Offline throughput by number of adapters: all requests at once, greedy, exact lengths.

Each count of adapters has a workload M1 of its own, which runs in several passes on one engine: in
the first the adapters come from disk, in the later ones they are in host memory. Prefix caching is
off, or the second pass would have its prompts for nothing.

    python benchmarks/offline.py --shape llama-3-8b --num-adapters 0 1 8 32 128 1000
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from loraplex.benchmarks import ceilings
from loraplex.benchmarks.plots import plot_offline
from loraplex.benchmarks.results import write_result
from loraplex.benchmarks.roofline import DecodeBytes, offline_seconds, token_flops
from loraplex.benchmarks.synthetic_model import SHAPES, write_model
from loraplex.benchmarks.workloads import WorkloadRequest, m1, num_distinct_adapters
from loraplex.engine.config import EngineConfig
from loraplex.engine.lora_request import LoRARequest
from loraplex.engine.sampling_params import SamplingParams
from loraplex.entrypoints.config_arguments import parse_size

if TYPE_CHECKING:
    from loraplex.engine.llm import LLM

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
COUNTERS = ("steps", "preemptions", "adapter_loads", "adapter_evictions")
HEADING = (
    f"{'adapters':>8} {'distinct':>8} {'pass':>4} {'requests/s':>10} {'tokens/s':>9} "
    f"{'of base':>7} {'floor':>7} {'steps':>6} {'preempted':>9} {'loads':>6} {'evicted':>7}"
)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    options = make_parser(prog).parse_args(argv)
    if min(options.num_adapters) < 0 or min(options.num_requests, options.passes) < 1:
        raise ValueError("--num-adapters must be 0 or more, --num-requests and --passes 1 or more")
    engine_options = make_engine_options(options)
    with prepared_model(options, engine_options) as (scratch, model):
        vocab_size = read_vocab_size(model)
        workloads = {
            count: m1(
                count, options.num_requests, options.input_len, options.output_len, vocab_size
            )
            for count in options.num_adapters
        }
        adapters = write_all_adapters(options, model, options.adapter_directory or scratch)
        most_distinct = max(map(num_distinct_adapters, workloads.values()))
        num_pages, page_bytes = adapter_size(
            model, engine_options, max(options.rank), options.modules
        )
        engine_options.setdefault(
            "host_adapter_bytes",
            max(EngineConfig.host_adapter_bytes, most_distinct * num_pages * page_bytes),
        )
        floors = floors_of(options, engine_options, model, workloads)
        llm, startup_seconds = start(model, engine_options)
        with llm:
            print(f"start-up {startup_seconds:.1f} s", flush=True)
            warm_up(llm, workloads[options.num_adapters[0]])
            figures: dict[str, Any] = {
                "model": options.shape or options.model,
                "engine_options": engine_options,
                "workload": {
                    name: getattr(options, name)
                    for name in ("num_requests", "input_len", "output_len", "rank", "modules")
                },
                "startup_seconds": round(startup_seconds, 2),
                "rows": [],
            }
            measure(llm, workloads, adapters, floors, options, figures)
    return 0


def make_parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog,
        description="Offline throughput by number of adapters: all requests at once, greedy, exact "
        "lengths, no prefix caching. One engine serves all counts. In the first pass over a "
        "workload its adapters come from disk, in the later ones they are in host memory. The "
        "defaults are the workload M1.",
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--num-adapters",
        type=int,
        nargs="+",
        default=[0, 1, 8, 32, 128, 1000],
        metavar="N",
        help="how many adapters the requests draw theirs from, in this order; 0 is the base "
        "model, which `of base` compares with (default: 0 1 8 32 128 1000)",
    )
    add_adapter_arguments(parser)
    numbers = [
        ("--num-requests", 512, "requests of a pass"),
        ("--input-len", 256, "tokens of each prompt, at random"),
        ("--output-len", 128, "tokens generated for each"),
        ("--passes", 2, "times that each workload runs"),
    ]
    for flag, default, text in numbers:
        parser.add_argument(
            flag, type=int, default=default, metavar="N", help=f"{text} (default: %(default)s)"
        )
    parser.add_argument("--max-num-seqs", type=int, metavar="N", help="most that run at once")
    parser.add_argument(
        "--max-num-batched-tokens", type=int, metavar="N", help="most tokens of one step"
    )
    ceilings.add_bandwidth_argument(parser)
    ceilings.add_flops_argument(parser)
    add_common_arguments(parser)
    return parser


def add_model_arguments(parser: argparse._ActionsContainer) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--model", default=EngineConfig.model, help="a directory or hub id (default: %(default)s)"
    )
    group.add_argument(
        "--shape", choices=list(SHAPES), help="a model of this shape with random weights"
    )


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """--engine-option, and --output."""
    parser.add_argument(
        "--engine-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other option of LLM(...), as in block_size=32, pool_bytes=2GiB, dtype=float32; "
        "may be given several times. What the benchmark needs is set unless given",
    )
    parser.add_argument(
        "--output", type=Path, help="JSON file to write; the picture goes beside it"
    )


def add_adapter_arguments(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--rank", type=int, nargs="+", default=[16], help="of adapters; several go round"
        " (default: 16)",
    )  # fmt: skip
    parser.add_argument(
        "--modules",
        nargs="+",
        default=ATTENTION,
        metavar="MODULE",
        help="that adapters target (default: the four of attention)",
    )
    parser.add_argument(
        "--adapter-directory",
        type=Path,
        help="where adapters are written, and left (default: a temporary directory, on a RAM disk "
        "if there is one)",
    )


def make_engine_options(options: argparse.Namespace) -> dict[str, Any]:
    """The options of LLM. Raises ValueError for an --engine-option that is none."""
    engine_options: dict[str, Any] = {"skip_tokenizer_init": True, "enable_prefix_caching": False}
    for name in ("max_num_seqs", "max_num_batched_tokens"):
        if getattr(options, name, None) is not None:
            engine_options[name] = getattr(options, name)
    engine_options |= dict(parse_engine_option(text) for text in options.engine_option)
    EngineConfig.from_options(**engine_options)
    return engine_options


def parse_engine_option(text: str) -> tuple[str, Any]:
    """A name and its value: a size if the name ends in _bytes, else JSON's or Python's literal,
    else a string. Raises ValueError."""
    name, separator, value = text.partition("=")
    if not (name and separator):
        raise ValueError(f"--engine-option {text!r} is not allowed: it must be name=value")
    if name.endswith("_bytes"):
        try:
            return name, parse_size(value)
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"--engine-option {text!r} is not allowed: {error}") from error
    literals = {"True": True, "False": False, "None": None}
    if value in literals:
        return name, literals[value]
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


@contextmanager
def prepared_model(
    options: argparse.Namespace, engine_options: dict[str, Any]
) -> Iterator[tuple[Path, str]]:
    """A directory that is there as long as this is, and the model: the one that the flags name, or
    one of their shape, for which engine_options then ask for random weights."""
    with tempfile.TemporaryDirectory(dir=scratch_directory()) as name:
        scratch, model = Path(name), options.model
        if options.shape is not None:
            model = str(write_model(scratch / options.shape, options.shape))
            engine_options.setdefault("load_format", "dummy")
        yield scratch, model


def scratch_directory() -> str | None:
    """A RAM disk, if there is one."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def read_vocab_size(model: str) -> int:
    from loraplex.engine.models.config import read_model_config
    from loraplex.engine.models.locate import locate_model

    return int(read_model_config(locate_model(model)).vocab_size)


def write_all_adapters(
    options: argparse.Namespace, model: str, directory: Path
) -> dict[int, list[Path]]:
    """Adapters for each count. Each has its own, or the first pass would find some in memory."""
    from loraplex.benchmarks.synthetic_adapters import write_adapters
    from loraplex.engine.models.registry import lora_spec

    spec, _ = lora_spec(model)
    return {
        count: write_adapters(
            directory / f"of{count}", spec, count, ranks=options.rank, modules=options.modules
        )
        for count in options.num_adapters
    }


def adapter_size(
    model: str, engine_options: dict[str, Any], rank: int, modules: Sequence[str] | None
) -> tuple[int, int]:
    """Pages that an adapter of this rank takes, and the bytes of a page; modules: None is all."""
    from loraplex.benchmarks.synthetic_adapters import places_of
    from loraplex.engine.models.config import read_model_config, resolve_dtype
    from loraplex.engine.models.locate import locate_model
    from loraplex.engine.models.registry import lora_spec
    from loraplex.lora.image import image_num_pages

    config = EngineConfig.from_options(**engine_options)
    spec, page_bytes = lora_spec(
        model, None, config.dtype, config.block_size, config.kv_cache_dtype
    )
    itemsize = resolve_dtype(config.dtype, read_model_config(locate_model(model))).itemsize
    ranks = dict.fromkeys(places_of(spec, modules), rank)
    return image_num_pages(ranks, spec, page_bytes, itemsize), page_bytes


def floors_of(
    options: argparse.Namespace,
    engine_options: dict[str, Any],
    model: str,
    workloads: Mapping[int, Sequence[WorkloadRequest]],
) -> dict[int, float | None]:
    """The seconds that a pass of each workload takes at least; None where it is not known what the
    device can do."""
    from loraplex.engine.models.config import read_model_config, resolve_dtype
    from loraplex.engine.models.locate import locate_model

    limits = ceilings.resolve_ceilings(options, engine_options)
    if limits.bandwidth is None or limits.flops is None:
        return dict.fromkeys(workloads)
    config = EngineConfig.from_options(**engine_options)
    hf_config = read_model_config(locate_model(model))
    itemsize = resolve_dtype(config.dtype, hf_config).itemsize
    needs, flops = (
        DecodeBytes.of_model(hf_config, itemsize, options.modules),
        token_flops(hf_config),
    )
    return {
        count: offline_seconds(
            needs,
            flops,
            workload,
            config.max_num_seqs,
            mean(options.rank),
            limits.bandwidth,
            limits.flops,
        )
        for count, workload in workloads.items()
    }


def start(model: str, engine_options: dict[str, Any]) -> tuple[LLM, float]:
    """An engine, and the seconds that it took to start."""
    from loraplex.engine.llm import LLM

    began = time.perf_counter()
    llm = LLM(model, **engine_options)
    return llm, time.perf_counter() - began


def warm_up(llm: LLM, workload: list[WorkloadRequest]) -> None:
    """A few tokens of the base model, so that no pass pays for what happens once."""
    prompts = [request.prompt_token_ids for request in workload[:8]]
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    llm.generate(prompts, params, use_tqdm=False)


def measure(
    llm: LLM,
    workloads: dict[int, list[WorkloadRequest]],
    adapters: dict[int, list[Path]],
    floors: dict[int, float | None],
    options: argparse.Namespace,
    figures: dict[str, Any],
) -> None:
    """Run all passes, print a line for each, and write the results after each: a long run that is
    cut off keeps what it has."""
    name = f"offline_{Path(figures['model']).name}"
    rows = figures["rows"]
    bases: dict[int, float] = {}
    print(HEADING, flush=True)
    for count, workload in workloads.items():
        for number in range(1, options.passes + 1):
            row = {
                "num_adapters": count,
                "num_distinct": num_distinct_adapters(workload),
                "pass": number,
                **run_pass(llm, workload, adapters[count]),
            }
            if count == 0:
                bases[number] = row["requests_per_second"]
            # Against the same pass, because some things happen in the first one only.
            row["share_of_base"] = (
                round(row["requests_per_second"] / bases[number], 4) if bases else None
            )
            floor = floors[count]
            row["floor_seconds"] = None if floor is None else round(floor, 6)
            row["share_of_floor"] = None if floor is None else round(floor / row["seconds"], 4)
            rows.append(row)
            print_row(row)
            path = write_result(name, figures, options.output)
    print(f"written to {path}")
    picture = plot_offline(
        rows, f"{name}, rank {' '.join(map(str, options.rank))}", path.with_suffix(".png")
    )
    if picture is not None:
        print(f"written to {picture}")


def run_pass(llm: LLM, workload: list[WorkloadRequest], adapters: list[Path]) -> dict[str, Any]:
    """The figures of one pass. RuntimeError if a request fails or has not its tokens."""
    prompts = [request.prompt_token_ids for request in workload]
    params = [
        SamplingParams(temperature=0, max_tokens=request.max_tokens, ignore_eos=True)
        for request in workload
    ]
    lora_requests = [
        None
        if request.adapter is None
        else LoRARequest(str(adapters[request.adapter]), str(adapters[request.adapter]))
        for request in workload
    ]
    before = llm.stats()
    began = time.perf_counter()
    outputs = llm.generate(prompts, params, lora_requests, use_tqdm=False)
    seconds = time.perf_counter() - began
    after = llm.stats()
    num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    if num_tokens != sum(request.max_tokens for request in workload):
        raise RuntimeError(f"the engine gave {num_tokens} tokens, which is not what was asked for")
    return {
        "seconds": round(seconds, 6),
        "requests_per_second": round(len(workload) / seconds, 3),
        "output_tokens_per_second": round(num_tokens / seconds, 1),
        **{name: after[name] - before[name] for name in COUNTERS},
    }


def print_row(row: dict[str, Any]) -> None:
    of_base, of_floor = (
        "-" if row[name] is None else f"{row[name]:.2f}"
        for name in ("share_of_base", "share_of_floor")
    )
    print(
        f"{row['num_adapters']:>8} {row['num_distinct']:>8} {row['pass']:>4} "
        f"{row['requests_per_second']:>10.2f} {row['output_tokens_per_second']:>9.0f} "
        f"{of_base:>7} {of_floor:>7} {row['steps']:>6} {row['preemptions']:>9} "
        f"{row['adapter_loads']:>6} {row['adapter_evictions']:>7}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
