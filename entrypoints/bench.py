"""`loraplex bench`: measures this machine, or a running server. The benchmarks have their flags."""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import Any

BENCHMARKS = {
    "offline": "Throughput of the offline engine by number of adapters.",
    "serve": "Latency of an OpenAI-compatible server under traffic that does not wait for it.",
    "decode": "The time of a decode step by batch, adapters and rank against its floor.",
    "cold": "What requests to adapters in host memory cost themselves and those that run.",
    "server": "What HTTP costs: streams and cancelled requests without a model behind them.",
    "many": "Servers with more and more adapters: start-up, throughput and memory.",
    "faults": "What faults of adapters cost: the requests that meet them, and those beside.",
    "eviction": "What to evict: policies and fixed splits, on a simulated H100 or this machine.",
    "loading": "Time and memory of loading a checkpoint, against reading its bytes.",
    "kernels": "The kernels against what this machine's memory and arithmetic allow.",
}
EXAMPLES = """\
examples:
  loraplex bench offline --shape tiny --num-adapters 0 4 --num-requests 32
      sees in seconds that everything works
  loraplex bench offline --shape llama-3-8b --num-adapters 0 1 8 32 128 1000
      random weights, one engine for all counts; adapters first from disk, then from memory
  loraplex bench serve --url http://localhost:8000 --rate 4 --duration 60
      any OpenAI-compatible server with the adapters that it lists
  loraplex bench serve --model DIRECTORY --num-adapters 100 --alpha 0.3 -- --max-num-seqs 64
      a server of its own; what follows -- are flags of `loraplex serve`
  loraplex bench decode --shape llama-3-8b --batch 64 256 --adapters 0 16 batch --ranks 16
      the whole engine; without flags, the whole grid
  loraplex bench cold --shape llama-3-8b --num-running 64 --num-cold 100 --rate 20
      gaps between tokens and times to first token, adapters cold and warm
  loraplex bench many --num-adapters 5 20 100 1000 2000
      a server for each count, under uniform and skewed traffic; its memory, and its start-up
  loraplex bench faults
      a hub and an S3 store that fail, 500 first requests at once, 200 adapters swapped
  loraplex bench eviction --workloads chat scan --seeds 1
      the real scheduler and pool on a simulated device; needs neither a GPU nor a model
  loraplex bench server --num-streams 1000
      tokens a second of SSE, the server's CPU time for each, and what cancelled requests leave
  loraplex bench loading --shape llama-3-8b --num-layers 4 --quantization none fp8 bitsandbytes
      a sharded checkpoint of random weights, each load in a process of its own
  loraplex bench kernels
      the GPU's where there is one, else the CPU's

`loraplex bench BENCHMARK --help` lists a benchmark's flags. Results are JSON, with the machine,
the versions and the command in them, and a picture if matplotlib is there.
"""

# Where the module has another name than the benchmark.
MODULES = {
    "decode": "decode_step",
    "cold": "cold_adapters",
    "server": "server_load",
    "many": "many_adapters",
    "faults": "adapter_faults",
}


class _Forwarder(argparse.ArgumentParser):
    """Leaves all flags to the benchmark, whose parser may need what is slow to import."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        namespace = argparse.Namespace() if namespace is None else namespace
        namespace.flags = args
        return namespace, []


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    benchmarks = parser.add_subparsers(
        dest="benchmark", required=True, metavar="BENCHMARK", parser_class=_Forwarder
    )
    for name, text in BENCHMARKS.items():
        benchmarks.add_parser(name, help=text)


def run_bench(arguments: argparse.Namespace) -> int:
    """Run a benchmark; what it returns. Raises ValueError, RuntimeError."""
    if arguments.benchmark == "kernels":
        name = _kernels()
    else:
        name = MODULES.get(arguments.benchmark, arguments.benchmark)
    module = import_module(f"loraplex.benchmarks.{name}")
    return module.main(arguments.flags, prog=f"loraplex bench {arguments.benchmark}")


def _kernels() -> str:
    """The benchmark of this machine's kernels."""
    # Imported late: it brings torch.
    from loraplex.engine.config import EngineConfig
    from loraplex.engine.runner.device import resolve_device

    return "gpu_kernels" if resolve_device(EngineConfig()).type == "cuda" else "cpu_kernels"
