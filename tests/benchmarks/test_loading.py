"""The benchmark of loading, on a model of two small layers."""

from __future__ import annotations

import json

from loraplex.benchmarks import loading


def test_what_it_reports(tmp_path):
    output = tmp_path / "loading.json"
    flags = ["--shape", "tiny", "--num-layers", "2", "--num-shards", "2", "--output", str(output)]
    assert loading.main([*flags, "--quantization", "none", "fp8"]) == 0
    plain, quantised = json.loads(output.read_text())["figures"]
    assert (plain["quantization"], quantised["quantization"]) == ("none", "fp8")
    assert 0 < plain["largest_shard_bytes"] < plain["checkpoint_bytes"]
    assert plain["load_seconds"] > 0
    assert plain["host_peak_bytes"] >= plain["host_after_bytes"]
