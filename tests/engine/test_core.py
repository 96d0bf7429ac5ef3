"""The host half as a whole, on a device that notices every mix-up."""

from __future__ import annotations

import random

import pytest
from fake_device import (
    EOS_TOKEN_ID,
    INVOCATION_TOKEN_IDS,
    expected_tokens,
    fake_core,
    make_request,
    run_to_end,
    tokens_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.engine.errors import RequestError
from loraplex.engine.lora_request import LoRARequest
from loraplex.engine.memory.eviction import POLICIES
from loraplex.engine.messages import EngineOutput, EngineRequest, FinishReason, Service


def run_all(core, requests: list[EngineRequest]):
    for request in requests:
        core.add_request(request)
    return run_to_end(core)


def assert_all_expected(requests, outputs) -> None:
    for request in requests:
        assert tokens_of(outputs[request.request_id]) == expected_tokens(request)
        assert outputs[request.request_id][-1].finish_reason == FinishReason.LENGTH


def test_mixed_adapters_in_one_batch_get_their_own_tokens():
    core = fake_core(num_pages=100)
    requests = [
        make_request(f"r{i}", range(i, 2 * i + 1), max_tokens=5, adapter=adapter)
        for i, adapter in enumerate([None, "a", "b", "a", None, "c"])
    ]
    outputs = run_all(core, requests)
    assert_all_expected(requests, outputs)
    assert core.stats()["adapter_loads"] == 3
    assert max(core._device.runner.batches) > 10, "requests were batched"


def test_long_prompts_are_chunked_and_decodes_go_on_meanwhile():
    core = fake_core(num_pages=100, max_num_batched_tokens=8)
    core.add_request(make_request("short", [1], max_tokens=20))
    core.step()
    core.add_request(make_request("long", range(30), max_tokens=1))
    steps_with_short = 0
    while not (outputs := {o.request_id: o for o in core.step()}).get("long"):
        steps_with_short += "short" in outputs
    assert steps_with_short == 4, "30 tokens in chunks of 7, 7, 7, 7, 2, a decode in each"
    run_to_end(core)


def test_prefix_is_reused_within_an_adapter_only():
    core = fake_core(num_pages=100)
    prompt = list(range(20))
    for adapter, num_cached in [("a", 0), ("a", 16), ("b", 0), (None, 0), (None, 16), ("b", 16)]:
        request = make_request("r", prompt, max_tokens=3, adapter=adapter)
        outputs = run_all(core, [request])
        assert_all_expected([request], outputs)
        assert outputs["r"][0].num_cached_tokens == num_cached
    assert core.stats()["prefix_hit_tokens"] == 48


def test_the_prefix_before_an_invocation_is_the_base_models():
    core = fake_core(num_pages=100)
    prompt = [*range(20, 30), *INVOCATION_TOKEN_IDS, *range(30, 38)]
    requests = []
    for i, (adapter, num_cached) in enumerate(
        [(None, 0), ("activated", 8), ("activated", 16), ("activated-too", 8), ("a", 0), (None, 16)]
    ):
        requests.append(make_request(f"r{i}", prompt, 3, adapter=adapter))
        outputs = run_all(core, requests[-1:])
        assert outputs[f"r{i}"][0].num_cached_tokens == num_cached
        assert_all_expected(requests[-1:], outputs)


def test_a_prompt_that_is_cached_whole_still_computes_its_last_token():
    core = fake_core(num_pages=100)
    request = make_request("r", range(16), max_tokens=3)
    run_all(core, [request])
    outputs = run_all(core, [request])
    assert outputs["r"][0].num_cached_tokens == 12
    assert_all_expected([request], outputs)


def test_preempted_requests_give_the_same_tokens():
    core = fake_core(num_pages=14, max_model_len=32)
    requests = [make_request(f"r{i}", range(4 * i, 4 * i + 8), 24) for i in range(4)]
    outputs = run_all(core, requests)
    assert_all_expected(requests, outputs)
    assert core.stats()["preemptions"] > 0


def test_adapters_are_evicted_when_others_need_the_memory():
    core = fake_core(num_pages=14, max_model_len=16)
    requests = [
        make_request(f"r{i}", [i, 1, 2], 6, adapter=f"a{i % 5}", num_adapter_pages=4)
        for i in range(20)
    ]
    outputs = run_all(core, requests)
    assert_all_expected(requests, outputs)
    assert core.stats()["adapter_evictions"] > 0


def test_a_failing_adapter_fails_its_requests_only():
    core = fake_core(num_pages=50)
    bad = make_request("bad", [1, 2], 4, adapter="x")
    bad.lora_request = type(bad.lora_request)("x", "fail")
    good = make_request("good", [1, 2], 4, adapter="a")
    outputs = run_all(core, [bad, good])
    assert_all_expected([good], outputs)
    assert outputs["bad"][-1].finish_reason == FinishReason.ERROR
    assert "can't be served" in outputs["bad"][-1].error


def test_an_adapter_larger_than_the_pool_is_refused_with_the_figures():
    core = fake_core(num_pages=20)
    outputs = run_all(core, [make_request("r", [1], 4, adapter="big", num_adapter_pages=30)])
    assert "32 pages of the pool, which has 19" in outputs["r"][-1].error


def test_requests_that_can_never_run_are_refused_at_once():
    core = fake_core(num_pages=20, max_model_len=32)
    with pytest.raises(RequestError, match="max_model_len=32"):
        core.add_request(make_request("r", range(30), 10))
    core.add_request(make_request("r", [1], 10))
    with pytest.raises(RequestError, match="in use"):
        core.add_request(make_request("r", [1], 10))
    with pytest.raises(ValueError, match="raise pool_bytes"):
        fake_core(num_pages=3)


def test_abort_ends_waiting_and_running_requests_and_frees_all():
    core = fake_core(num_pages=50, max_num_seqs=2)
    for i in range(4):
        core.add_request(make_request(f"r{i}", [i] * 5, 20, adapter=f"a{i}"))
    for _ in range(6):
        core.step()
        core._device.adapter_store.finish_copies()
    core.abort_requests(["r0", "r3", "unknown"])
    core.check_integrity()
    outputs = run_to_end(core)
    assert outputs["r0"][-1].finish_reason == FinishReason.ABORT
    assert outputs["r3"][-1].finish_reason == FinishReason.ABORT
    assert len(tokens_of(outputs["r1"])) == 20 or outputs["r1"]
    stats = core.stats()
    assert stats["pages_kv"] == stats["pages_adapter"] == 0


def test_a_hot_adapter_does_not_starve_others():
    core = fake_core(num_pages=60, max_num_seqs=4)
    hot = [make_request(f"hot{i}", [i, 1, 2, 3], 8, adapter="hot") for i in range(100)]
    cold = [make_request(f"cold{i}", [i, 1, 2, 3], 8, adapter=f"c{i}") for i in range(4)]
    for request in hot + cold:
        core.add_request(request)
    finished: list[str] = []
    while core.has_unfinished_requests():
        finished += [o.request_id for o in core.step() if o.finish_reason]
        core._device.adapter_store.finish_copies()
    worst = max(finished.index(r.request_id) for r in cold)
    assert worst < 40, "cold requests, which came last, are served long before the hot queue ends"
    assert sorted(finished) == sorted(r.request_id for r in hot + cold)


KINDS_OF_SAMPLING = {
    "greedy": {},
    "random": {"temperature": 1.0},
    "min_tokens": {"min_tokens": 3},
    "penalties": {"presence_penalty": 0.5},
    "prompt_logprobs": {"prompt_logprobs": 0},
}


@pytest.mark.parametrize("steps_ahead", [0, 1])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_workload_ends_with_the_right_tokens(data, steps_ahead: int):
    block_size = data.draw(st.sampled_from([1, 3, 4]), "block_size")
    max_model_len = 24
    num_blocks = -(-max_model_len // block_size)
    core = fake_core(
        num_pages=data.draw(st.integers(num_blocks + 4, num_blocks + 24), "num_pages"),
        max_model_len=max_model_len,
        block_size=block_size,
        steps_ahead=steps_ahead,
        num_awaited_pages=data.draw(st.sampled_from([0, 3, 100]), "num_awaited_pages"),
        max_num_seqs=data.draw(st.integers(1, 6), "max_num_seqs"),
        max_num_batched_tokens=data.draw(st.integers(6, 20), "max_num_batched_tokens"),
        enable_prefix_caching=data.draw(st.booleans(), "enable_prefix_caching"),
        adapter_affinity_tokens=data.draw(st.sampled_from([0, 5, 100]), "affinity"),
        eviction_policy=data.draw(st.sampled_from(sorted(POLICIES)), "eviction_policy"),
    )
    # Ids are used again after an abort: each id has had these requests, one after the other.
    requests: dict[str, list[EngineRequest]] = {}
    outputs: dict[str, list[EngineOutput]] = {}

    def add(request_id: str) -> None:
        prompt_len = data.draw(st.integers(1, 14))
        prompt = [data.draw(st.integers(0, 1))] * prompt_len
        if prompt_len > 1 and data.draw(st.booleans()):
            start = data.draw(st.integers(0, prompt_len - 2))
            prompt[start : start + 2] = INVOCATION_TOKEN_IDS
        max_tokens = data.draw(st.integers(1, max_model_len - prompt_len))
        sampling = dict(KINDS_OF_SAMPLING[data.draw(st.sampled_from(sorted(KINDS_OF_SAMPLING)))])
        if "min_tokens" in sampling:
            sampling["min_tokens"] = min(sampling["min_tokens"], max_tokens)
        request = make_request(
            request_id,
            prompt,
            max_tokens,
            adapter=data.draw(st.sampled_from([None, "a", "b", "activated", "activated-too"])),
            num_adapter_pages=3,
            service=Service(tenant=data.draw(st.sampled_from(["", "t"]))),
            eos_token_ids=data.draw(st.sampled_from([(EOS_TOKEN_ID,), range(0, EOS_TOKEN_ID, 8)])),
            **sampling,
        )
        core.add_request(request)
        requests.setdefault(request_id, []).append(request)

    aborted: list[EngineRequest] = []
    for i in range(data.draw(st.integers(1, 12), "num_requests")):
        add(f"r{i}")
        for _ in range(data.draw(st.integers(0, 3))):
            for output in core.step():
                outputs.setdefault(output.request_id, []).append(output)
            core.check_integrity()
            if data.draw(st.booleans()):
                core._device.adapter_store.finish_copies()
        if data.draw(st.integers(0, 5)) == 0:
            victim = data.draw(st.sampled_from(sorted(requests)))
            aborted.append(requests[victim][-1])
            core.abort_requests([victim])
            if data.draw(st.booleans()):
                add(victim)
    for request_id, more in run_to_end(core).items():
        outputs.setdefault(request_id, []).extend(more)
    for request_id, in_turn in requests.items():
        for request, part in zip(in_turn, split_at_ends(outputs[request_id]), strict=True):
            assert_right(request, part, is_aborted=request in aborted)
    everything = [output for parts in outputs.values() for output in parts]
    assert core.stats()["output_tokens"] == len(tokens_of(everything))


def split_at_ends(outputs: list[EngineOutput]) -> list[list[EngineOutput]]:
    parts: list[list[EngineOutput]] = [[]]
    for output in outputs:
        parts[-1].append(output)
        if output.finish_reason is not None:
            parts.append([])
    assert parts.pop() == [], "the last output tells the end"
    return parts


def assert_right(request: EngineRequest, outputs: list[EngineOutput], is_aborted: bool) -> None:
    tokens, expected = tokens_of(outputs), expected_tokens(request)
    if outputs[-1].finish_reason == FinishReason.ABORT:
        assert is_aborted
        assert tokens == expected[: len(tokens)]
        return
    assert tokens == expected
    is_stopped = tokens[-1] in request.eos_token_ids
    assert outputs[-1].finish_reason == (FinishReason.STOP if is_stopped else FinishReason.LENGTH)
    if request.sampling_params.prompt_logprobs is not None:
        scored = [entry.token_ids[0] for entry in outputs[0].prompt_logprobs]
        assert scored == request.prompt_token_ids[1:]


def test_ten_thousand_requests_that_are_cancelled_at_random_leave_the_pool_as_it_was():
    core = fake_core(200, max_model_len=32, steps_ahead=1, max_num_seqs=64,
                     max_num_batched_tokens=512)  # fmt: skip
    rng = random.Random(0)
    idle = core.stats()
    num_added, running = 0, []
    while num_added < 10_000 or core.has_unfinished_requests():
        for _ in range(min(rng.randrange(120), 10_000 - num_added)):
            adapter = f"a{rng.randrange(12)}" if rng.random() < 0.5 else None
            prompt = range(start := rng.randrange(4), start + rng.randrange(1, 12))
            core.add_request(make_request(f"r{num_added}", prompt, rng.randrange(1, 6), adapter))
            running.append(f"r{num_added}")
            num_added += 1
        core.step()
        core._device.adapter_store.finish_copies()
        # Some of these have finished meanwhile, or were never admitted.
        rng.shuffle(running)
        core.abort_requests([running.pop() for _ in range(min(len(running), rng.randrange(80)))])
    core.check_integrity()
    stats = core.stats()
    for name in ("pages_total", "pages_kv", "pages_adapter", "num_running", "num_waiting"):
        assert stats[name] == idle[name], name
    not_in_use = sum(stats[f"pages_{s}"] for s in ("free", "kv_cached", "adapter_idle"))
    assert not_in_use == stats["pages_total"]


def test_what_the_front_waited_for_files_counts_as_download():
    core = fake_core(40)
    request = make_request("r", [1, 2, 3], 2, adapter="a")
    request.fetch_seconds = 5.0
    core.add_request(request)
    wait = next(output.adapter_wait for output in run_to_end(core)["r"] if output.adapter_wait)
    assert 5.0 <= wait.download < 10.0


def test_files_are_located_while_requests_run():
    core = fake_core(40)
    core._device.adapter_store.holds_fetches = True
    located = core.locate_adapter(LoRARequest("a", "a:pages=2"))
    failing = core.locate_adapter(LoRARequest("b", "b:fail"))
    request = make_request("base", [1, 2, 3], 3)
    core.add_request(request)
    outputs = [output for _ in range(6) for output in core.step()]
    assert tokens_of(outputs) == expected_tokens(request)
    assert not located.done()
    core._device.adapter_store.finish_fetches()
    run_to_end(core)
    assert located.result()["directory"] == failing.result()["directory"] == "/nowhere"
    version = located.result()["version"]
    known = core.locate_adapter(LoRARequest("a", "a:pages=2"), version)
    run_to_end(core)
    assert known.result() == {"version": version, "directory": None}
    assert len(core._device.adapter_store.located) == 2
