"""The offline benchmark, on a model of two small layers."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

from loraplex.benchmarks import offline
from loraplex.benchmarks.workloads import m1

SMALL = ["--shape", "tiny", "--num-requests", "8", "--input-len", "12", "--output-len", "5"]


def run(tmp_path, *flags: str) -> dict:
    output = tmp_path / "out.json"
    assert offline.main([*SMALL, *flags, "--output", str(output)]) == 0
    return json.loads(output.read_text())


@pytest.mark.usefixtures("one_thread")
def test_from_base_model_to_adapters(tmp_path, capsys):
    result = run(tmp_path, "--num-adapters", "0", "2", "3", "--rank", "4", "--max-num-seqs", "4",
                 "--bandwidth", "0.02", "--teraflops", "0.4")  # fmt: skip
    rows = result["figures"]["rows"]
    counts = [0, 0, 2, 2, 3, 3]
    assert [(row["num_adapters"], row["pass"]) for row in rows] == list(
        zip(counts, [1, 2] * 3, strict=True)
    )
    assert [row["num_distinct"] for row in rows] == counts
    # The first pass has everything to load, the second nothing; and no prompt was in the cache.
    assert [row["adapter_loads"] for row in rows] == [0, 0, 2, 0, 3, 0]
    assert {row["preemptions"] for row in rows} == {0}
    assert all(row["steps"] >= 10 for row in rows), "4 at once, 8 requests of 5 tokens"
    for row in rows:
        assert row["requests_per_second"] == pytest.approx(8 / row["seconds"], rel=0.05)
        assert row["output_tokens_per_second"] == pytest.approx(40 / row["seconds"], rel=0.05)
    shares = [row["requests_per_second"] / rows[i % 2]["requests_per_second"] for i, row in
              enumerate(rows)]  # fmt: skip
    assert [row["share_of_base"] for row in rows] == pytest.approx(shares, abs=1e-3)
    assert all(0 < row["share_of_floor"] < 1 for row in rows)
    assert rows[4]["floor_seconds"] > rows[0]["floor_seconds"], "adapters are bytes, too"
    assert result["figures"]["engine_options"]["max_num_seqs"] == 4
    assert result["figures"]["engine_options"]["enable_prefix_caching"] is False
    assert "torch" in result["versions"]
    assert len(capsys.readouterr().out.splitlines()) >= 6


@pytest.mark.usefixtures("one_thread")
def test_the_picture_and_the_run_without_one(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    run(tmp_path, "--num-adapters", "0", "--passes", "1")
    picture = tmp_path / "out.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    picture.unlink()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run(tmp_path, "--num-adapters", "2", "--passes", "1")
    assert not picture.exists()
    assert capsys.readouterr().out.splitlines()[-1].startswith("no plot: matplotlib is not")


def test_each_request_goes_to_its_adapter_with_its_length(tmp_path):
    seen = {}

    def generate(prompts, params, lora_requests, use_tqdm):
        seen.update(zip(map(tuple, prompts), zip(params, lora_requests, strict=True), strict=True))
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[0] * 3)]) for _ in prompts]

    llm = SimpleNamespace(generate=generate, stats=lambda: dict.fromkeys(offline.COUNTERS, 0))
    paths = [tmp_path / f"a{i}" for i in range(4)]
    workload = m1(4, num_requests=20, input_len=8, output_len=3)
    offline.run_pass(llm, workload, paths)
    for request in workload:
        params, lora_request = seen[tuple(request.prompt_token_ids)]
        assert lora_request.lora_path == str(paths[request.adapter])
        assert (params.max_tokens, params.ignore_eos, params.temperature) == (3, True, 0)
    with pytest.raises(RuntimeError, match="60 tokens, which is not what was asked for"):
        offline.run_pass(llm, m1(4, num_requests=20, input_len=8, output_len=4), paths)


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("block_size=32", ("block_size", 32)),
        ("pool_bytes=2GiB", ("pool_bytes", 2 << 30)),
        ("gpu_memory_utilization=0.9", ("gpu_memory_utilization", 0.9)),
        ("enforce_eager=true", ("enforce_eager", True)),
        ("enforce_eager=False", ("enforce_eager", False)),
        ("dtype=float32", ("dtype", "float32")),
        ("tokenizer=a=b", ("tokenizer", "a=b")),
        ("revision=None", ("revision", None)),
    ],
)
def test_engine_options(text, option):
    assert offline.parse_engine_option(text) == option


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--engine-option", "block_size"], "must be name=value"),
        (["--engine-option", "pool_bytes=much"], "'much' is not a size"),
        (["--engine-option", "pages=3"], "'pages' is not an option"),
        (["--num-adapters", "-1"], "--num-adapters must be 0 or more"),
        (["--modules", "qproj"], "are not allowed"),
    ],
)
def test_mistakes_are_told_before_anything_runs(tmp_path, flags, words):
    with pytest.raises(ValueError, match=words):
        run(tmp_path, "--num-adapters", "1", *flags)
    assert list(tmp_path.iterdir()) == []
