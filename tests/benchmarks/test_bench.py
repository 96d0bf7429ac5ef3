"""`loraplex bench`, the scripts, and where results go."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from loraplex.benchmarks import cpu_kernels, results
from loraplex.engine.runner import device as resolving
from loraplex.entrypoints.bench import BENCHMARKS
from loraplex.entrypoints.cli import main

ROOT = Path(__file__).parents[2]
SCRIPTS = [
    "offline.py", "serve.py", "synthetic_adapters.py", "decode_step.py", "cold_adapters.py",
    "gpu_kernels.py", "cpu_kernels.py", "eviction.py",
]  # fmt: skip
RUN = """
import sys
from loraplex.entrypoints.cli import main
try:
    main(sys.argv[1:])
finally:
    print('heavy:', sorted({'torch', 'transformers', 'fastapi'} & sys.modules.keys()))
"""


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], [*BENCHMARKS, "loraplex bench offline --shape llama-3-8b", "examples:"]),
        (["offline"], ["usage: loraplex bench offline", "--num-adapters", "--engine-option"]),
        (["serve"], ["usage: loraplex bench serve [flags] [-- flags", "--slo-ttft", "--cv"]),
        (["decode"], ["usage: loraplex bench decode", "--batch", "--bandwidth"]),
        (["many"], ["usage: loraplex bench many", "--num-adapters"]),
        (["cold"], ["usage: loraplex bench cold", "--num-running", "--rate"]),
        (["eviction"], ["usage: loraplex bench eviction", "--workloads", "--splits"]),
    ],
)
def test_help_is_quick_and_names_the_flags(flags, words):
    done = subprocess.run(
        [sys.executable, "-c", RUN, "bench", *flags, "--help"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    for word in words:
        assert word in done.stdout
    assert done.stdout.endswith("heavy: []\n")


def test_help_of_the_cpu_kernels(capsys):
    with pytest.raises(SystemExit) as caught:
        cpu_kernels.main(["--help"], prog="loraplex bench kernels")
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("usage: loraplex bench kernels [-h] [--isa")


@pytest.mark.parametrize(("device", "module"), [("cpu", "cpu_kernels"), ("cuda", "gpu_kernels")])
def test_kernels_are_those_of_the_machine(device, module, monkeypatch):
    called = []
    monkeypatch.setattr(resolving, "resolve_device", lambda config: torch.device(device))
    for name in ("cpu_kernels", "gpu_kernels"):
        kernels = import_module(f"loraplex.benchmarks.{name}")
        monkeypatch.setattr(kernels, "main", lambda argv, prog, name=name: called.append(name) or 0)
    assert main(["bench", "kernels", "--only", "lora"]) == 0
    assert called == [module]


def test_a_mistake_is_one_line(capsys):
    assert main(["bench", "offline", "--engine-option", "x=1"]) == 2
    assert capsys.readouterr().err.startswith("loraplex: 'x' is not an option")
    with pytest.raises(SystemExit):
        main(["bench", "online"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_run_from_the_checkout(script):
    done = subprocess.run(
        [sys.executable, f"benchmarks/{script}", "--help"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: {script}")


def test_where_results_go(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert results.write_result("x", {"a": 1}) == Path("x.json")
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    assert results.write_result("x", {"a": 2}) == Path("benchmarks/results/x.json")
    chosen = tmp_path / "new/y.json"
    assert results.write_result("x", {"a": 3}, chosen) == chosen
    result = json.loads(chosen.read_text())
    assert result["figures"] == {"a": 3}
    assert {"python", "torch", "loraplex"} <= result["versions"].keys()
    assert "gpu" not in result


def test_results_name_the_accelerator_and_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"Card {index}")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(sys, "argv", ["/opt/venv/bin/loraplex", "bench", "offline"])
    result = json.loads(results.write_result("x", {}, tmp_path / "x.json").read_text())
    assert (result["gpu"], result["num_gpus"], result["cuda"]) == ("Card 0", 2, "13.0")
    assert result["command"] == "loraplex bench offline"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "scripts/run.py"), "--fast"])
    result = json.loads(results.write_result("x", {}, tmp_path / "x.json").read_text())
    assert result["command"] == "python scripts/run.py --fast"
