"""The benchmarks of kernels and of decode steps run on a CUDA device, at sizes of seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from loraplex.benchmarks import cold_adapters, decode_step, gpu_kernels
from loraplex.benchmarks.gpu_timing import GpuBench, Memory
from loraplex.benchmarks.kernel_cases import ModelShape


@torch.inference_mode()
def test_gpu_kernels(tmp_path: Path) -> None:
    pytest.importorskip("flashinfer")
    device = torch.device("cuda", torch.cuda.current_device())
    grid = gpu_kernels.Grid(
        shape=ModelShape(2, hidden=256, intermediate=512, num_heads=4, num_kv_heads=2, head_dim=64),
        vocab_size=1024,
        ranks=(8,),
        batches=(4, 1),
        num_adapters=(2, "batch"),
        prefill_rows=64,
        decode_contexts=(32,),
        prefills=((1, 32),),
        rotated_bytes=1 << 20,
        max_calls=64,
    )
    bench = GpuBench(Memory(256 << 20, device), device, repetitions=2, product_size=512)
    output = tmp_path / "out.json"
    assert gpu_kernels.run(bench, grid, "A card", list(gpu_kernels.FAMILIES), output) == 0
    figures = json.loads(output.read_text())["figures"]
    assert figures["launch_microseconds"] > 0
    assert {case["case"].split(":")[0] for case in figures["cases"]} >= {
        "lora qkv", "lora down", "lora layer", "attention", "linears", "rows",
    }  # fmt: skip
    assert all(case["microseconds"] > 0 for case in figures["cases"])


def test_engine_benchmarks(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    flags = ["--shape", "tiny", "--output", str(output), "--engine-option"]
    decode = [*flags, "pool_bytes=64MiB", "--batch", "4", "--ranks", "8", "--adapters", "2"]
    assert decode_step.main([*decode, "--context", "20", "--steps", "6"]) == 0
    figures = json.loads(output.read_text())["figures"]
    assert [row["adapters"] for row in figures["rows"]] == [0, 2]
    cold = [*flags, "device=cuda", "--num-running", "3", "--num-cold", "6", "--rate", "100"]
    assert cold_adapters.main([*cold, "--rank", "8", "--running-output-len", "700"]) == 0
    phases = json.loads(output.read_text())["figures"]["phases"]
    assert [phase["adapter_loads"] for phase in phases] == [0, 0, 6]
