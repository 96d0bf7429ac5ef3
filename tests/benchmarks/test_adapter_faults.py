"""The benchmark of faults, on a model of two small layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loraplex.benchmarks import adapter_faults
from loraplex.benchmarks.faults import FAULTS
from loraplex.lora import host_store

SMALL = ["--shape", "tiny", "--num-running", "3", "--num-first", "20", "--num-swapped", "6"]
SMALL += ["--quiet-seconds", "0.05"]
OPTIONS = ["device=cpu", "pool_bytes=16MiB", "adapter_backoff_seconds=0.01",
           "adapter_stall_seconds=0.1", "adapter_retry_seconds=0"]  # fmt: skip


def run(tmp_path: Path) -> list[dict]:
    output, flags = tmp_path / "out.json", [f"--engine-option={option}" for option in OPTIONS]
    assert adapter_faults.main([*SMALL, *flags, "--output", str(output)]) == 0
    return json.loads(output.read_text())["figures"]["rows"]


@pytest.mark.usefixtures("one_thread")
def test_every_fault_has_its_figures(tmp_path):
    rows = {row["fault"]: row for row in run(tmp_path)}
    assert list(rows) == [*FAULTS, "20 first requests", "6 hot-swapped"]
    statuses = [rows[name]["status"] for name in FAULTS]
    assert statuses == [400, 502, 507, 502, 504, 504, 404]
    for row in rows.values():
        assert row["wrong"] == 0
        assert row["num_steady"] > 0
        assert row["before"]["pages_free"] == row["after"]["pages_free"] > 0
        assert row["before"]["open_files"] == row["after"]["open_files"] > 0
        assert 0 < row["itl_ms"]["p99"] <= row["itl_ms"]["max"]
    crowd, swap = rows["20 first requests"], rows["6 hot-swapped"]
    assert crowd["adapter_downloads"] == crowd["adapter_loads"] == 1
    assert swap["adapter_loads"] == 12, "two versions of each"
    assert swap["swap_ms"]["p50"] > 0


@pytest.mark.usefixtures("one_thread")
def test_wrong_tokens_and_lost_memory_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(adapter_faults, "FAULTS", {})
    monkeypatch.setattr(host_store.HostAdapterStore, "drop", lambda store, key: None)
    expected = iter([[0], [1], [2], [3]])
    init = adapter_faults.FaultBench.__init__

    def expect_nonsense(bench, *args):
        init(bench, *args)
        bench.expected = list(expected)

    monkeypatch.setattr(adapter_faults.FaultBench, "__init__", expect_nonsense)
    with pytest.raises(RuntimeError, match=r"wrong .*'20 first.*not given back .*'6 hot-swapped'"):
        run(tmp_path)
