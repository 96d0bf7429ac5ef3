"""The benchmark of eviction: small, in simulated time, and its parts."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from loraplex.benchmarks import eviction
from loraplex.benchmarks.conversations import WORKLOADS, Conversation, Traffic, Turn, fit_in
from loraplex.benchmarks.replay import Replay
from loraplex.benchmarks.simulated_device import CostModel, SimulatedDevice
from loraplex.benchmarks.split_pool import SplitPool
from loraplex.engine.config import EngineConfig
from loraplex.engine.core import EngineCore
from loraplex.engine.memory.page_pool import PagePool

COSTS = CostModel()


def replay_of(conversations: list[Conversation], make_pool=PagePool) -> tuple[Replay, EngineCore]:
    device = SimulatedDevice(COSTS, 2000, max_model_len=16_384)
    core = EngineCore(EngineConfig(), lambda config, wake: device, make_pool)
    return Replay(core, device, conversations), core


def test_the_table_the_file_and_the_picture(tmp_path: Path, capsys):
    output = tmp_path / "out.json"
    flags = ["--workloads", "scan", "--seeds", "2", "--duration", "3", "--pool-pages", "2000"]
    assert eviction.main([*flags, "--splits", "30", "--jobs", "1", "--output", str(output)]) == 0
    figures = json.loads(output.read_text())["figures"]
    cases = [(row["load"], row["memory"]) for row in figures["rows"]]
    memories = ["cost_aware", "lru", "split 30"]
    assert cases == [(load, memory) for load in eviction.LOADS for memory in memories]
    assert len(figures["runs"]) == 2 * len(cases)
    for row in figures["rows"]:
        of = [
            r for r in figures["runs"] if (r["load"], r["memory"]) == (row["load"], row["memory"])
        ]
        mean = sum(r["tokens_per_second"] for r in of) / 2
        assert row["tokens_per_second"] == pytest.approx(mean, rel=1e-3)
    assert "split 30" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "flags",
    [
        ["--seeds", "0"],
        ["--duration", "0"],
        ["--splits", "100"],
        ["--pool-pages", "-1"],
        ["--rate-factor", "0"],
    ],
)
def test_what_is_not_allowed_is_named(flags):
    with pytest.raises(ValueError, match=f"{flags[0]} {flags[1]}.*is not allowed"):
        eviction.main(flags)


@pytest.mark.parametrize("option", ["pool_bytes=1GiB", "eviction_policy=lru"])
def test_what_cases_set_is_no_option(option):
    with pytest.raises(ValueError, match=f"{option.split('=')[0]} is not allowed"):
        eviction.main(["--engine-option", option])


@pytest.mark.usefixtures("one_thread")
def test_the_real_engine_serves_all_cases_with_one_device(tmp_path: Path, capsys):
    output = tmp_path / "out.json"
    flags = ["--shape", "tiny", "--engine-option", "device=cpu", "--engine-option",
             "max_num_seqs=16", "--workloads", "uniform", "--loads", "saturated",
             "--splits", "20", "--seeds", "1", "--duration", "1", "--pool-pages", "1200",
             "--output", str(output)]  # fmt: skip
    assert eviction.main(flags) == 0
    printed = capsys.readouterr().out
    assert printed.count("start-up") == 1
    figures = json.loads(output.read_text())["figures"]
    assert "{0} of {0} adapters in host memory".format(figures["num_adapters"]) in printed
    memories = ["cost_aware", "lru", "split 20"]
    assert [row["memory"] for row in figures["rows"]] == memories
    assert figures["num_adapters"] > 30
    for row in figures["rows"]:
        assert row["tokens_per_second"] > 0
        assert 0 <= row["adapter_hit_rate"] <= 1
        assert row["prefix_hit_rate"] == 0, "no two questions begin alike"
    pytest.importorskip("matplotlib")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_a_smaller_pool_has_fewer_adapters_and_shorter_pauses():
    full, small = (WORKLOADS["chat"](Traffic(20.0, 20.0, 0, scale)) for scale in (1.0, 0.1))
    assert 20 > max(c.adapter for c in small) > 0
    assert max(c.adapter for c in full) > 100
    longest = [max(t.pause for c in of for t in c.turns) for of in (full, small)]
    assert 5 * longest[1] < longest[0]


def test_turns_that_would_not_fit_are_left_out():
    turns = [Turn([1] * 30, 20, 0.0), Turn([1] * 30, 20, 1.0)]
    short, long = (Conversation(0.0, 0, [1] * size, turns) for size in (100, 180))
    assert fit_in([short, long], 200) == [short]
    assert [len(c.turns) for c in fit_in([short, long], 199)] == [1]
    assert [len(c.turns) for c in fit_in([short, long], 230)] == [2, 1]


@pytest.mark.parametrize("name", WORKLOADS)
def test_workloads_are_seeded_and_come_at_their_rate(name):
    make = WORKLOADS[name]
    conversations = make(Traffic(20.0, 20.0, 1))
    assert conversations == make(Traffic(20.0, 20.0, 1)) != make(Traffic(20.0, 20.0, 2))
    assert 200 < len(conversations) < 800
    num_tokens = [
        len(c.opening) + sum(len(t.token_ids) + t.max_tokens for t in c.turns)
        for c in conversations
    ]
    assert max(num_tokens) < eviction.MAX_MODEL_LEN


def test_a_turn_goes_on_from_the_answer_and_finds_it_cached():
    turns = [Turn(list(range(40)), 20, 0.0), Turn(list(range(50, 90)), 5, 30.0)]
    replay, core = replay_of([Conversation(1.0, 0, list(range(100)), turns)])
    replay.run_until(100.0)
    assert not core.has_unfinished_requests()
    counters = replay.counters()
    assert counters["output_tokens"] == 25
    assert counters["requests"] == 2
    assert counters["prompt_tokens"] == 140 + 200
    # The last token of the answer was never computed.
    assert counters["prefix_hit_tokens"] == 159 // 16 * 16
    copy = COSTS.copy_seconds(COSTS.adapter_pages)
    assert copy < replay.ttfts[0] < copy + 0.02
    assert 0.006 < replay.ttfts[1] < 0.01, "no copy, and the weights are read once"


def test_what_is_cut_off_leaves_nothing_under_way():
    replay, core = replay_of(WORKLOADS["uniform"](Traffic(60.0, 8.0, 0)))
    replay.run_until(2.0)
    assert core.has_unfinished_requests()
    replay.end()
    assert not core.has_unfinished_requests()
    assert core.stats()["pages_adapter"] == core.stats()["pages_kv"] == 0
    core.check_integrity()


def test_a_split_pool_keeps_each_side_to_its_share():
    conversations = WORKLOADS["scan"](Traffic(30.0, 8.0, 0))
    replay, core = replay_of(conversations, partial(SplitPool, adapter_share=0.1))
    most = int(0.1 * 1999)
    for end in range(1, 30):
        replay.run_until(float(end))
        core.check_integrity()
        stats = core.stats()
        num_adapter_pages = stats["pages_adapter"] + stats["pages_adapter_idle"]
        assert num_adapter_pages <= most
        assert stats["pages_kv"] + stats["pages_kv_cached"] <= 1999 - most
    assert num_adapter_pages > most - COSTS.adapter_pages
    assert stats["adapter_evictions"] > 0
