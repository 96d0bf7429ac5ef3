"""The engine core on a device that is given a step before the tokens of the last are known."""

from __future__ import annotations

import pytest
from fake_device import (
    VOCAB_SIZE,
    FakeRunner,
    expected_tokens,
    fake_core,
    make_request,
    next_token,
    run_to_end,
    tokens_of,
)

from loraplex.engine.core import EngineCore
from loraplex.engine.messages import EngineRequest, FinishReason
from loraplex.engine.request import Request


def ahead_core(num_pages: int = 100, **options) -> EngineCore:
    return fake_core(num_pages, steps_ahead=1, **options)


def runner_of(core: EngineCore) -> FakeRunner:
    return core._device.runner


def request_that_stops(request_id: str, num_tokens: int, max_tokens: int = 20) -> EngineRequest:
    """Its output ends with end of sequence after so many tokens."""
    free = make_request(request_id, [1, 2, 3], max_tokens)
    eos_token_id = expected_tokens(free)[num_tokens - 1]
    return make_request(request_id, [1, 2, 3], max_tokens, eos_token_ids=[eos_token_id])


def spy_on_preemptions(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    preempted: list[Request] = []
    preempt = core._scheduler._preempt

    def spy(request: Request) -> None:
        preempted.append(request)
        preempt(request)

    monkeypatch.setattr(core._scheduler, "_preempt", spy)
    return preempted


def test_a_step_is_launched_before_the_tokens_of_the_last_are_known():
    core = ahead_core()
    request = make_request("r", [1, 2, 3], max_tokens=5)
    core.add_request(request)
    assert core.step() == []
    assert core.has_unfinished_requests()
    outputs = core.step()
    assert [o.new_token_ids for o in outputs] == [[next_token("", [1, 2, 3])]]
    (step,) = runner_of(core).in_flight
    assert step.computed is None
    assert step.batch.token_slots.tolist() == step.batch.sampled_slots.tolist() == [0]
    core.check_integrity()
    assert core.stats()["output_tokens"] == 1
    assert tokens_of(outputs + run_to_end(core)["r"]) == expected_tokens(request)


def test_no_row_is_planned_beyond_max_tokens():
    requests = [make_request(f"r{i}", range(3 + 5 * i), max_tokens=1 + 2 * i) for i in range(4)]
    batches = []
    for steps_ahead in (0, 1):
        core = fake_core(100, steps_ahead=steps_ahead, enable_prefix_caching=False)
        for request in requests:
            core.add_request(request)
        outputs = run_to_end(core)
        for request in requests:
            assert tokens_of(outputs[request.request_id]) == expected_tokens(request)
        batches.append(runner_of(core).batches)
    assert batches[0] == batches[1]


def test_end_of_sequence_with_a_step_in_flight_frees_all_and_drops_the_surplus_token():
    core = ahead_core()
    request = request_that_stops("r", num_tokens=3)
    core.add_request(request)
    outputs = []
    while not (outputs and outputs[-1].finish_reason):
        outputs += core.step()
        core.check_integrity()
    assert outputs[-1].finish_reason == FinishReason.STOP
    assert tokens_of(outputs) == expected_tokens(request)
    stats = core.stats()
    assert stats["pages_kv"] == stats["num_running"] == 0
    assert len(runner_of(core).in_flight) == 1
    assert core.has_unfinished_requests()
    core.wait_for_work(1000)  # There is a step to take in.
    assert core.step() == []
    assert not core.has_unfinished_requests()
    assert not runner_of(core).in_flight
    assert runner_of(core).batches == [3, 1, 1, 1], "two decodes, and one too many"
    assert core.stats()["output_tokens"] == 3


def test_the_slot_of_a_stopped_request_is_used_again_while_its_last_row_is_in_flight():
    core = ahead_core(num_pages=18, max_num_seqs=1)
    requests = [request_that_stops("a", num_tokens=3)]
    requests += [make_request("b", range(60), 4), request_that_stops("c", num_tokens=1)]
    requests += [make_request("d", [1, 2], 30)]
    for request in requests:
        core.add_request(request)
    outputs = run_to_end(core)
    for request in requests:
        assert tokens_of(outputs[request.request_id]) == expected_tokens(request)


def test_a_preempted_request_gets_the_token_that_was_on_its_way(monkeypatch):
    core = ahead_core(num_pages=14, max_model_len=32)
    preempted = spy_on_preemptions(core, monkeypatch)
    requests = [make_request(f"r{i}", range(4 * i, 4 * i + 8), 24) for i in range(4)]
    for request in requests:
        core.add_request(request)
    outputs: dict[str, list] = {}
    num_told_while_waiting = 0
    while core.has_unfinished_requests():
        preempted.clear()
        told = core.step()
        core.check_integrity()
        for output in told:
            outputs.setdefault(output.request_id, []).append(output)
        ids = {o.request_id for o in told}
        assert all(r.num_pending_tokens == 0 for r in preempted)
        num_told_while_waiting += sum(r.request_id in ids for r in preempted)
    assert num_told_while_waiting > 0
    for request in requests:
        assert tokens_of(outputs[request.request_id]) == expected_tokens(request)


def test_a_preempted_request_may_be_ended_by_the_token_that_was_on_its_way(monkeypatch):
    core = ahead_core(num_pages=14, max_model_len=32)
    preempted = spy_on_preemptions(core, monkeypatch)
    num_ended_while_waiting = 0
    for first in range(20):
        requests = [
            make_request(f"r{i}", [first, i, 1, 2, 3, 4, 5], 24, eos_token_ids=range(0, 1000, 15))
            for i in range(4)
        ]
        for request in requests:
            core.add_request(request)
        outputs: dict[str, list] = {}
        while core.has_unfinished_requests():
            preempted.clear()
            for output in core.step():
                outputs.setdefault(output.request_id, []).append(output)
            core.check_integrity()
            num_ended_while_waiting += sum(
                outputs[r.request_id][-1].finish_reason is not None for r in preempted
            )
        for request in requests:
            assert tokens_of(outputs[request.request_id]) == expected_tokens(request)
    assert num_ended_while_waiting > 0


@pytest.mark.parametrize("num_steps_between", range(16))
def test_a_preempted_request_that_finds_room_at_once_is_given_nothing_twice(num_steps_between: int):
    for num_pages in range(26, 48):
        core = ahead_core(
            num_pages,
            max_model_len=24,
            block_size=1,
            max_num_batched_tokens=6,
            max_num_seqs=2,
            enable_prefix_caching=False,
        )
        first = make_request("first", range(10), 14, prompt_logprobs=0)
        last = make_request("last", range(20), 4, prompt_logprobs=0)
        core.add_request(first)
        outputs = {"first": [o for _ in range(num_steps_between) for o in core.step()]}
        core.add_request(last)
        for request_id, more in run_to_end(core).items():
            outputs[request_id] = outputs.get(request_id, []) + more
        for request in (first, last):
            given = outputs[request.request_id]
            assert tokens_of(given) == expected_tokens(request)
            scored = [entry.token_ids[0] for entry in given[0].prompt_logprobs]
            assert scored == request.prompt_token_ids[1:]


def test_outputs_are_found_by_the_next_turn_of_a_conversation():
    num_cached = []
    for steps_ahead in (0, 1):
        core = fake_core(100, steps_ahead=steps_ahead)
        first = make_request("first", [1, 2, 3], 20)
        core.add_request(first)
        answer = tokens_of(run_to_end(core)["first"])
        core.add_request(make_request("second", [1, 2, 3, *answer, 4], 5))
        num_cached.append(run_to_end(core)["second"][0].num_cached_tokens)
    assert num_cached == [20, 20]


def test_abort_with_a_step_in_flight_and_the_id_used_again_at_once():
    core = ahead_core()
    other = make_request("other", [5, 6], 10)
    core.add_request(make_request("r", [1, 2, 3], 10))
    core.add_request(other)
    outputs = core.step() + core.step()
    assert len(runner_of(core).in_flight) == 1
    core.abort_requests(["r"])
    again = make_request("r", [7, 8], 4)
    core.add_request(again)
    core.check_integrity()
    for more in run_to_end(core).values():
        outputs += more
    mine = [o for o in outputs if o.request_id == "r"]
    assert [o.finish_reason for o in mine] == [None, FinishReason.ABORT, *[None] * 3, "length"]
    assert tokens_of(mine[2:]) == expected_tokens(again)
    assert tokens_of([o for o in outputs if o.request_id == "other"]) == expected_tokens(other)


def test_an_engine_whose_last_request_is_aborted_takes_in_what_is_in_flight():
    core = ahead_core()
    core.add_request(make_request("r", [1, 2, 3], 10, adapter="a"))
    while not runner_of(core).in_flight:
        core.step()
        core._device.adapter_store.finish_copies()
    core.abort_requests(["r"])
    assert [o.finish_reason for o in core.step()] == [FinishReason.ABORT]
    assert not core.has_unfinished_requests()
    assert not runner_of(core).in_flight
    core.check_integrity()


def test_there_is_no_waiting_after_a_step_that_took_something_in():
    core = ahead_core()
    core.add_request(make_request("r", [1, 2, 3], 1))
    assert core.step() == []
    assert len(core.step()) == 1
    core.add_request(make_request("next", [1, 2, 3], 1))
    core.wait_for_work(1000)


def test_a_step_with_penalties_is_waited_for():
    core = ahead_core()
    plain = make_request("plain", [1, 2], 12)
    careful = make_request("careful", range(20), 4, frequency_penalty=0.5)
    core.add_request(plain)
    core.step()
    core.add_request(careful)
    outputs = {"plain": [], "careful": []}
    num_in_flight = []
    while core.has_unfinished_requests():
        for output in core.step():
            outputs[output.request_id].append(output)
        num_in_flight.append(len(runner_of(core).in_flight))
    # Its prompt takes two steps, then there are three decodes; the plain request's 12th token comes
    # of the 12th step, and the first step is not counted here.
    assert num_in_flight == [1, *[0] * 4, *[1] * 6, 0]
    assert tokens_of(outputs["plain"]) == expected_tokens(plain)
    assert tokens_of(outputs["careful"]) == expected_tokens(careful)


def step_of_first_token(core: EngineCore, adapter: str) -> int:
    """Steps until a request to the adapter, whose image is in host memory, has a token."""
    core.add_request(make_request(adapter, [1, 2, 3], 2, adapter=adapter))
    for num_steps in range(1, 20):
        outputs = core.step()
        core.check_integrity()
        core._device.adapter_store.finish_copies()
        if any(output.new_token_ids for output in outputs if output.request_id == adapter):
            run_to_end(core)
            return num_steps
    raise AssertionError("no token")


@pytest.mark.parametrize(("num_awaited_pages", "num_more_steps"), [(0, 1), (1, 1), (2, 0)])
def test_a_step_waits_for_copies_of_few_pages(num_awaited_pages, num_more_steps):
    core = ahead_core(num_awaited_pages=num_awaited_pages)
    core._device.adapter_store.num_polls = 0
    cold, warm = (step_of_first_token(core, "a") for _ in range(2))
    assert cold - warm == num_more_steps


def test_a_copy_waits_for_the_step_in_flight_only_if_that_may_use_its_pages():
    # Room for a request and one adapter.
    core = ahead_core(num_pages=9, num_awaited_pages=2, max_model_len=24)
    store = core._device.adapter_store
    store.num_polls, waits = 0, []
    copy_to_pages = store.copy_to_pages

    def spy(version, pages, after_steps, before_steps):
        waits.append(after_steps)
        return copy_to_pages(version, pages, after_steps, before_steps)

    store.copy_to_pages = spy
    for i in range(4):
        # The first token ends it: its pages are free while a step with it is in flight.
        core.add_request(
            make_request(f"r{i}", [1] * 20, 2, adapter=f"a{i}", eos_token_ids=range(64))
        )
        core.add_request(
            make_request(f"s{i}", [1] * 20, 2, adapter=f"b{i}", eos_token_ids=range(64))
        )
        run_to_end(core)
    assert waits[0] is False, "nobody has used these pages"
    assert set(waits) == {True, False}


def test_bad_words_of_several_tokens_are_seen_in_time():
    """Their beginnings are tokens that the host must know before it asks for the next."""
    free = make_request("free", [1, 2, 3], max_tokens=12)
    sequence = expected_tokens(free)[4:7]
    core = ahead_core()
    held = make_request("held", [1, 2, 3], max_tokens=12)
    held.bad_words_token_ids = [sequence, [5]]
    for request in (free, held):
        core.add_request(request)
    outputs = run_to_end(core)
    assert tokens_of(outputs["free"]) == expected_tokens(free)
    output = tokens_of(outputs["held"])
    assert output[:6] == expected_tokens(free)[:6]
    assert output[6] == (sequence[-1] + 1) % VOCAB_SIZE
    core.check_integrity()
