"""Bounds on waiting: how many, how long, and that nobody starves; by a clock that tests turn."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
from fake_device import fake_core, make_request, run_to_end
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.engine.core import EngineCore
from loraplex.engine.errors import RequestError
from loraplex.engine.messages import FinishReason, Service
from loraplex.engine.request import OUTPUT_TOKEN_COST, PROMPT_TOKEN_COST


class Clock:
    """The engine's idea of the time, to be set."""

    def __init__(self, core: EngineCore) -> None:
        self.now = 1000.0
        core._scheduler._waiting._admission._clock = lambda: self.now


def refused(core: EngineCore, request_id: str, **service) -> RequestError:
    with pytest.raises(RequestError) as caught:
        core.add_request(make_request(request_id, [1], 10, service=Service(**service)))
    return caught.value


def test_a_full_queue_refuses_but_not_whom_it_has_not_served_yet():
    core = fake_core(num_pages=100, max_num_seqs=1, max_num_waiting=3)
    for i in range(3):
        core.add_request(make_request(f"r{i}", [1], 10))
    error = refused(core, "r3")
    assert error.status == 429
    assert error.retry_after >= 1
    assert "max_num_waiting is 3" in str(error)
    for i in range(3):
        core.add_request(make_request(f"t{i}", [1], 10, service=Service(tenant=f"t{i}")))
        refused(core, "more", tenant=f"t{i}")
    # Twice as many is too many for anyone.
    refused(core, "u", tenant="u")
    assert len(run_to_end(core)) == 6
    core.add_request(make_request("r4", [1], 10))
    run_to_end(core)


def test_a_request_that_waits_too_long_is_ended_and_one_that_runs_is_not():
    core = fake_core(num_pages=100, max_num_seqs=1, max_queue_seconds=5)
    clock = Clock(core)
    core.add_request(make_request("runs", [1], 50))
    core.step()
    core.add_request(make_request("patient", [1], 2, service=Service(max_queue_seconds=1000)))
    core.add_request(make_request("late", [1], 2))
    clock.now += 4.9
    assert all(output.request_id == "runs" for output in core.step())
    clock.now += 0.2
    ended = [output for output in core.step() if output.finish_reason is not None]
    assert [(o.request_id, o.finish_reason, o.error_status) for o in ended] == [
        ("late", FinishReason.ERROR, 503)
    ]
    assert "max_queue_seconds=5" in ended[0].error
    assert ended[0].retry_after >= 1
    outputs = run_to_end(core)
    assert outputs["runs"][-1].finish_reason == FinishReason.LENGTH
    assert outputs["patient"][-1].finish_reason == FinishReason.LENGTH


def test_a_request_that_would_wait_too_long_is_refused_at_once():
    core = fake_core(num_pages=100, max_num_seqs=1)
    clock = Clock(core)
    for i in range(10):
        core.add_request(make_request(f"r{i}", [1] * 10, 20))
    for _ in range(25):
        core.step()
        clock.now += 1.0
    # About 2 of service a second, and 10 + 2 * 20 for each of the 8 that wait.
    error = refused(core, "late", max_queue_seconds=60)
    assert error.status == 429
    assert 60 < error.retry_after < 300
    assert "would wait for about" in str(error)
    core.add_request(make_request("patient", [1], 2, service=Service(max_queue_seconds=600)))
    # A tenant with nothing in the queue is served next, whatever the others wait for.
    other = Service(tenant="t", max_queue_seconds=60)
    core.add_request(make_request("other", [1], 2, service=other))
    outputs = run_to_end(core)
    assert outputs["other"][-1].finish_reason == FinishReason.LENGTH


def test_priority_orders_the_requests_of_one_tenant():
    core = fake_core(num_pages=100, max_num_seqs=1)
    for request_id, priority in [("a", 0), ("b", 5), ("c", -1), ("d", 0), ("e", -1)]:
        core.add_request(make_request(request_id, [1], 2, service=Service(priority=priority)))
    ends = []
    while core.has_unfinished_requests():
        ends += [o.request_id for o in core.step() if o.finish_reason is not None]
    assert ends == ["c", "e", "a", "d", "b"]


def test_service_goes_by_weight():
    core = fake_core(num_pages=100, max_num_seqs=2)
    weights = {"light": 1.0, "heavy": 3.0}
    for i in range(60):
        for tenant, weight in weights.items():
            service = Service(tenant=tenant, weight=weight)
            core.add_request(make_request(f"{tenant}{i}", [1], 4, service=service))
    served: Counter[str] = Counter()
    while sum(served.values()) < 60:
        served.update(o.request_id.rstrip("0123456789") for o in core.step() if o.finish_reason)
    assert served["heavy"] == pytest.approx(3 * served["light"], rel=0.1)
    run_to_end(core)


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_no_key_gets_ahead_of_one_that_waits_by_more_than_the_bound(data):
    """The bound of fair_queue's docstring, while both wait all the time, and once more what can run
    at a time: what is admitted in the step that a key's turn waits for its adapter to be copied."""
    max_num_seqs, affinity = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([0, 30]))
    max_tokens, max_prompt = 6, 8
    core = fake_core(
        num_pages=40, max_num_seqs=max_num_seqs, adapter_affinity_tokens=affinity, max_model_len=32
    )
    keys = [(tenant, adapter) for tenant in ("", "t") for adapter in (None, "a", "b")]
    num_left = Counter({key: data.draw(st.integers(1, 30)) for key in keys})
    costs = {}
    for index, key in enumerate(num_left.elements()):
        tenant, adapter = key
        prompt_len, num_tokens = (
            data.draw(st.integers(1, max_prompt)),
            data.draw(st.integers(1, max_tokens)),
        )
        request_id = f"r{index}"
        costs[request_id] = key, PROMPT_TOKEN_COST * prompt_len
        core.add_request(
            make_request(
                request_id, range(prompt_len), num_tokens, adapter=adapter, num_adapter_pages=3,
                service=Service(tenant=tenant), eos_token_ids=[],
            )
        )  # fmt: skip
    most = PROMPT_TOKEN_COST * max_prompt + OUTPUT_TOKEN_COST * max_tokens
    bound = affinity + 2 * max_num_seqs * most
    service: defaultdict[tuple, int] = defaultdict(int)
    started = set()
    while core.has_unfinished_requests():
        for output in core.step():
            key, prompt_cost = costs[output.request_id]
            if output.request_id not in started:
                started.add(output.request_id)
                service[key] += prompt_cost
            service[key] += OUTPUT_TOKEN_COST * len(output.new_token_ids)
            num_left[key] -= output.finish_reason is not None
        core._device.adapter_store.finish_copies()
        waiting = [key for key in keys if num_left[key] > max_num_seqs]
        for key in waiting:
            for other in waiting:
                assert service[other] - service[key] <= bound, (key, other)
    core.check_integrity()
