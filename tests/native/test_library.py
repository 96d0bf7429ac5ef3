"""Loading the library: which instruction set, and whose OpenMP threads."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from loraplex import native


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_environment_chooses_the_instruction_set() -> None:
    code = "from loraplex import native; print(native.get_cpu_isa())"
    result = run_python(code, LORAPLEX_CPU_ISA="portable")
    assert result.stdout == "portable\n", result.stderr


def test_unknown_instruction_set_is_refused() -> None:
    result = run_python("import loraplex.native", LORAPLEX_CPU_ISA="avx1024")
    assert result.returncode != 0
    assert "ValueError: LORAPLEX_CPU_ISA='avx1024' is not allowed" in result.stderr
    assert "portable" in result.stderr


def test_the_best_instruction_set_is_the_default() -> None:
    result = run_python(
        "from loraplex import native; print(native.get_cpu_isa(), native.supported_cpu_isas()[-1])",
    )
    active, best = result.stdout.split()
    assert active == os.environ.get("LORAPLEX_CPU_ISA", best)


def test_set_cpu_isa_refuses_what_the_machine_lacks() -> None:
    with pytest.raises(ValueError, match="'avx1024' is not an instruction set.*portable"):
        native.set_cpu_isa("avx1024")


def test_kernels_run_on_the_threads_of_torch() -> None:
    """A second OpenMP runtime would bring threads of its own, spinning on the same cores."""
    code = """
import os, torch
torch.set_num_threads(3)
torch.randn(512, 512) @ torch.randn(512, 512)
from loraplex import native
before = len(os.listdir("/proc/self/task"))
x = torch.randn(4096, 512)
native.rms_norm(torch.empty_like(x), x, torch.ones(512), 1e-5, 0.0)
maps = open("/proc/self/maps").read().splitlines()
runtimes = {line.split()[-1] for line in maps if "libgomp" in line or "libomp" in line}
print(len(os.listdir("/proc/self/task")) - before, len(runtimes))
"""
    result = run_python(code)
    assert result.stdout == "0 1\n", result.stdout + result.stderr
