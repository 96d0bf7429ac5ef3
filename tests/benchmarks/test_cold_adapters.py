"""The benchmark of cold adapters, on a model of two small layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loraplex.benchmarks import cold_adapters

SMALL = ["--shape", "tiny", "--num-running", "3", "--num-cold", "6", "--rate", "100"]
SMALL += ["--rank", "8", "--running-input-len", "24", "--running-output-len", "900"]
SMALL += ["--engine-option", "device=cpu"]


def run(tmp_path: Path, *flags: str) -> dict:
    output = tmp_path / "out.json"
    assert cold_adapters.main([*SMALL, *flags, "--output", str(output)]) == 0
    return json.loads(output.read_text())["figures"]


@pytest.mark.usefixtures("one_thread")
def test_three_phases(tmp_path, capsys):
    figures = run(tmp_path)
    phases = figures["phases"]
    assert [phase["phase"] for phase in phases] == ["quiet", "warm", "cold"]
    assert [phase["adapter_loads"] for phase in phases] == [0, 0, 6]
    assert [phase["preemptions"] for phase in phases] == [0, 0, 0]
    assert phases[0]["ttft_ms"] is None
    for phase in phases:
        assert phase["itl_ms"].keys() == {"mean", "p50", "p90", "p99", "max"}
        assert 0 < phase["itl_ms"]["p50"] <= phase["itl_ms"]["p99"] <= phase["itl_ms"]["max"]
        assert phase["seconds"] > 0
        assert phase["steps"] > 0
    for phase in phases[1:]:
        assert phase["ttft_ms"]["p50"] > 0
    assert figures["num_cold"] == 6
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith(("quiet", "warm", "cold"))] == [
        "quiet", "warm", "cold",
    ]  # fmt: skip
    pytest.importorskip("matplotlib")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("one_thread")
def test_adapters_that_are_not_cold_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(cold_adapters.ColdBench, "push_out_adapters", lambda bench: None)
    with pytest.raises(RuntimeError, match="0 adapters were loaded in the cold phase, and not 6"):
        run(tmp_path)
    figures = json.loads((tmp_path / "out.json").read_text())["figures"]
    assert len(figures["phases"]) == 3, "what was measured is kept"


@pytest.mark.usefixtures("one_thread")
def test_running_requests_must_outlast_the_arrivals(tmp_path):
    with pytest.raises(RuntimeError, match="raise --running-output-len"):
        run(tmp_path, "--rate", "1", "--running-output-len", "60", "--engine-option",
            "pool_bytes=4MiB")  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num-cold", "0"], "--num-cold 0 is not allowed"),
        (["--rate", "0"], "--rate 0.0 is not allowed"),
        (["--engine-option", "max_num_seqs=3"], "max_num_seqs=3 is not allowed"),
        (["--modules", "qproj"], "are not allowed"),
        (["--running-output-len", "0"], "--running-output-len 0 is not allowed"),
    ],
)
def test_mistakes_are_told_before_anything_runs(tmp_path, flags, words):
    with pytest.raises(ValueError, match=words):
        run(tmp_path, *flags)
    assert list(tmp_path.iterdir()) == []
