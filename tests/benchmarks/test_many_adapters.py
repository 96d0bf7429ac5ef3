"""The benchmark of many adapters, with few of them and a tiny model."""

from __future__ import annotations

import json
import os

import pytest

from loraplex.benchmarks import many_adapters


@pytest.mark.slow
def test_a_server_for_each_count(tmp_path):
    output = tmp_path / "many.json"
    flags = ["--shape", "tiny", "--num-adapters", "2", "30", "--num-requests", "8"]
    flags += ["--output-len", "2", "--output", str(output), "--", "--pool-bytes", "64M"]
    assert many_adapters.main(flags) == 0
    rows = json.loads(output.read_text())["figures"]["rows"]
    assert [row["num_adapters"] for row in rows] == [2] * 4 + [30] * 4
    for row in rows:
        assert row["errors"] == {}
        assert row["completed"] == 8
        assert row["memory_bytes"] > 100_000_000


def test_memory_is_that_of_a_process_and_its_descendants():
    assert many_adapters.memory_bytes(os.getpid()) > 10_000_000
