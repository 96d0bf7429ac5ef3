"""The benchmark of decode steps: its cases on a model of two small layers, and its arithmetic."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_device import fake_core

from loraplex.benchmarks import decode_step
from loraplex.benchmarks.synthetic_model import write_model
from loraplex.engine.config import EngineConfig

SMALL = ["--shape", "tiny", "--context", "20", "--steps", "6", "--bandwidth", "0.02"]
SMALL += ["--engine-option", "device=cpu"]


def run(tmp_path: Path, *flags: str) -> dict:
    output = tmp_path / "out.json"
    assert decode_step.main([*SMALL, *flags, "--output", str(output)]) == 0
    return json.loads(output.read_text())["figures"]


@pytest.mark.usefixtures("one_thread")
def test_the_grid(tmp_path, capsys):
    flags = ["--batch", "4", "2", "--adapters", "0", "batch", "1", "3", "--ranks", "8", "16"]
    figures = run(tmp_path, *flags, "--engine-option", "pool_bytes=64MiB")
    rows = figures["rows"]
    of_rank = [(4, 4), (4, 1), (4, 3), (2, 2), (2, 1)]
    assert [(row["batch"], row["adapters"], row["rank"]) for row in rows] == [
        (4, 0, 0), (2, 0, 0), *((*case, rank) for rank in (8, 16) for case in of_rank),
    ]  # fmt: skip
    assert figures["left_out"] == figures["failed"] == []
    needs = figures["bytes"]
    for row in rows:
        # All prompts fit in one step, and 8 steps go before the timed ones.
        assert row["mean_context"] == 20 + 1 + 8 + (6 + 1) / 2 - 2
        num_bytes = (
            needs["weights"]
            + row["adapters"] * row["rank"] * needs["rank"]
            + row["batch"] * (row["mean_context"] + 1) * needs["kv_token"]
        )
        assert row["bytes"] == num_bytes
        assert row["floor_ms"] == pytest.approx(num_bytes / 0.02e12 * 1e3, abs=1e-4)
        assert row["share"] == pytest.approx(row["floor_ms"] / row["ms"], abs=2e-3)
        assert row["median_ms"] <= row["max_ms"]
        base = next(r for r in rows if (r["batch"], r["adapters"]) == (row["batch"], 0))
        assert row["of_base"] == pytest.approx(base["ms"] / row["ms"], abs=1e-3)
    again = figures["base_behind_adapters"]
    assert [row["batch"] for row in again] == [4, 2]
    for row, base in zip(again, rows, strict=False):
        assert row["adapters_resident"] == 8
        assert row["before_ms"] == base["ms"]
        assert row["ratio"] == pytest.approx(row["after_ms"] / row["before_ms"], abs=1e-3)
    assert len(capsys.readouterr().out.splitlines()) >= 2 + len(rows) + len(again)
    pytest.importorskip("matplotlib")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("one_thread")
def test_what_does_not_fit_is_listed(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    # Pages of 8 KiB: an adapter of rank 64 takes about 39, and a request 4.
    flags = ["--batch", "4", "--adapters", "1", "batch", "--ranks", "64"]
    figures = run(tmp_path, *flags, "--engine-option", "pool_bytes=1MiB")
    assert [(row["adapters"], row["rank"]) for row in figures["rows"]] == [(0, 0), (1, 64)]
    (left_out,) = figures["left_out"]
    assert (left_out["batch"], left_out["adapters"], left_out["rank"]) == (4, 4, 64)
    assert "and the pool has 127" in left_out["reason"]
    assert f"left out: {left_out['reason']}" in capsys.readouterr().out


@pytest.mark.usefixtures("one_thread")
def test_a_case_that_fails_leaves_the_rest(tmp_path, monkeypatch):
    measure = decode_step.DecodeBench.measure

    def fail_once(bench, batch, num_adapters, rank):
        if batch == 2:
            raise RuntimeError("1 of 2 requests got a token in a step")
        return measure(bench, batch, num_adapters, rank)

    monkeypatch.setattr(decode_step.DecodeBench, "measure", fail_once)
    flags = ["--batch", "2", "1", "--adapters", "0", "--ranks", "8", "--output"]
    assert decode_step.main([*SMALL, *flags, str(tmp_path / "out.json")]) == 1
    figures = json.loads((tmp_path / "out.json").read_text())["figures"]
    assert [row["batch"] for row in figures["rows"]] == [1]
    assert figures["failed"][0]["reason"].startswith("1 of 2")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("models") / "tiny", "tiny"))


@pytest.mark.parametrize("steps_ahead", [0, 1])
@pytest.mark.parametrize("num_adapters", [0, 3])
def test_mean_context_of_staggered_requests(model, steps_ahead, num_adapters):
    """Prompts take many steps, in which the first requests decode already."""
    core = fake_core(400, max_model_len=200, steps_ahead=steps_ahead)
    store, runner = core._device.adapter_store, core._device.runner
    core.wait_for_work = lambda timeout: store.finish_copies()
    launched, launch = [], runner.launch

    def record(batch):
        launched.append(batch.seq_lens.tolist())
        return launch(batch)

    runner.launch = record
    options = SimpleNamespace(context=20, steps=5, modules=None)
    config = EngineConfig(model=model, max_num_seqs=8, max_num_batched_tokens=16)
    adapters = {8: [Path(f"a{i}:pages=2") for i in range(3)]}
    bench = decode_step.DecodeBench(core, config, options, 1e12, adapters)
    timed = []
    time_steps = bench.time_steps

    def note_end(batch):
        times = time_steps(batch)
        end = len(launched) - steps_ahead
        timed.extend(launched[end - options.steps : end])
        return times

    bench.time_steps = note_end
    row = bench.measure(6, num_adapters, 8)
    assert len(timed) == 5
    assert all(len(seq_lens) == 6 for seq_lens in timed)
    mean_seq_len = sum(map(sum, timed)) / 30
    assert row["mean_context"] == pytest.approx(mean_seq_len - 1, abs=0.06)
    assert not core.has_unfinished_requests()
    core.check_integrity()


def test_steps_with_anything_else_in_them_are_refused(model):
    options = SimpleNamespace(context=20, steps=5, modules=None)
    config = EngineConfig(model=model, max_num_seqs=8, max_num_batched_tokens=16)
    # The first request has its last token before the timed steps are over.
    core = fake_core(400, max_model_len=32)
    bench = decode_step.DecodeBench(core, config, options, 1e12, {})
    with pytest.raises(RuntimeError, match="1 of 2 requests got a token"):
        bench.measure(2, 0, 0)
    core = fake_core(400, max_model_len=200)
    bench = decode_step.DecodeBench(core, config, options, 1e12, {})
    stats = core.stats
    core.stats = lambda: {**stats(), "adapter_loads": stats()["steps"] > 10}
    with pytest.raises(RuntimeError, match="adapter_loads grew by"):
        bench.measure(2, 0, 0)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--batch", "0"], "--batch, --ranks, --context and --steps must be 1 or more"),
        (["--bandwidth", "-1"], "--bandwidth -1.0 is not allowed"),
        (["--batch", "8", "--engine-option", "max_num_seqs=4"], "max_num_seqs=4 is not allowed"),
        (["--modules", "qproj"], "are not allowed"),
        (["--engine-option", "pages=3"], "'pages' is not an option"),
    ],
)
def test_mistakes_are_told_before_anything_runs(tmp_path, flags, words):
    with pytest.raises(ValueError, match=words):
        run(tmp_path, *flags)
    assert list(tmp_path.iterdir()) == []


def test_the_cpu_needs_a_bandwidth():
    flags = ["--shape", "tiny", "--engine-option", "device=cpu"]
    with pytest.raises(ValueError, match="--bandwidth=None is not allowed on the CPU"):
        decode_step.main(flags)
    with pytest.raises(SystemExit):
        decode_step.main([*flags, "--adapters", "all"])
