"""What time and memory loading a sharded checkpoint takes, from the page cache.

python benchmarks/loading.py --shape llama-3-8b --num-layers 4 --quantization none fp8 bitsandbytes
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from loraplex.benchmarks.results import write_result
from loraplex.benchmarks.synthetic_model import SHAPES, write_model
from loraplex.engine.config import EngineConfig
from loraplex.engine.models.config import read_model_config, resolve_dtype
from loraplex.engine.models.registry import build_model
from loraplex.engine.runner.device import resolve_device

READ_BYTES = 32 << 20


@dataclass(frozen=True)
class Loading:
    """What one load took, in a process of its own."""

    quantization: str
    checkpoint_bytes: int
    largest_shard_bytes: int
    read_seconds: float
    """Reading all files into memory that is kept, as a load must."""
    read_cpu_seconds: float
    load_seconds: float
    """From the config to a model whose weights are laid out."""
    load_cpu_seconds: float
    """Of all threads."""
    host_peak_bytes: int
    """More than before the load, of anonymous memory and files."""
    host_after_bytes: int
    device_after_bytes: int


def write_checkpoint(directory: Path, shape: str, num_layers: int, num_shards: int) -> None:
    """A model of a shape, with random weights, cut to `num_layers`."""
    write_model(directory, shape)
    config = json.loads((directory / "config.json").read_text())
    config["num_hidden_layers"] = num_layers
    (directory / "config.json").write_text(json.dumps(config))
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(directory), dtype=torch.bfloat16
    )
    num_bytes = sum(p.nbytes for p in model.parameters())
    model.save_pretrained(directory, max_shard_size=num_bytes // num_shards + 1)


def measure(directory: Path, quantization: str) -> Loading:
    """Load the checkpoint in a process that starts from nothing."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_measure, (directory, quantization))


def _measure(directory: Path, quantization: str) -> Loading:
    files = sorted(directory.glob("*.safetensors"))
    for _ in range(2):  # once to bring them into the page cache
        read = _Stopwatch()
        kept = [_read(file) for file in files]
        read.stop()
        del kept
    hf_config = read_model_config(directory)
    config = EngineConfig(quantization=None if quantization == "none" else quantization)
    dtype = resolve_dtype("auto", hf_config)
    before = _host_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    load = _Stopwatch()
    device = resolve_device(config)
    model = build_model(config, directory, hf_config, dtype, 1024, device)
    load.stop()
    sizes = [file.stat().st_size for file in files]
    return Loading(
        quantization=quantization,
        checkpoint_bytes=sum(sizes),
        largest_shard_bytes=max(sizes),
        read_seconds=read.seconds,
        read_cpu_seconds=read.cpu_seconds,
        load_seconds=load.seconds,
        load_cpu_seconds=load.cpu_seconds,
        host_peak_bytes=_host_bytes("VmHWM") - before,
        host_after_bytes=_host_bytes("VmRSS") - before,
        device_after_bytes=torch.cuda.memory_allocated() if model.embedding.is_cuda else 0,
    )


class _Stopwatch:
    """Of the clock, and of what the process computed."""

    def __init__(self) -> None:
        self._started = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        self.seconds = round(time.perf_counter() - self._started[0], 3)
        self.cpu_seconds = round(time.process_time() - self._started[1], 3)


def _read(file: Path) -> bytearray:
    data = bytearray(file.stat().st_size)
    view, done = memoryview(data), 0
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(view[done : done + READ_BYTES]):
            done += count
    return data


def _host_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    raise AssertionError(field)


def main(flags: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--num-shards", type=int, default=4)
    parser.add_argument("--quantization", nargs="+", default=["none"])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args(flags)
    figures: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        write_checkpoint(path, arguments.shape, arguments.num_layers, arguments.num_shards)
        for quantization in arguments.quantization * arguments.repeats:
            loading = measure(path, quantization)
            figures.append(asdict(loading))
            gib = {k: f"{v / 2**30:.2f} GiB" for k, v in figures[-1].items() if "bytes" in k}
            print(quantization, figures[-1] | gib)
    print(write_result("loading", figures, arguments.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
