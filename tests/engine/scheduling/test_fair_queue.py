from __future__ import annotations

from fake_device import FakeFiles, make_request

from loraplex.engine.adapters.manager import Adapter
from loraplex.engine.lora_request import LoRARequest
from loraplex.engine.messages import Service
from loraplex.engine.request import Request
from loraplex.engine.scheduling.fair_queue import FairQueue

ADAPTERS = {name: Adapter(LoRARequest(name, name), FakeFiles(name, 0), 0) for name in "abc"}


def make(request_id: str, adapter: str, **service) -> Request:
    wire = make_request(request_id, [1] * 10, 8, service=Service(**service))
    return Request(wire, ADAPTERS[adapter])


def serve(queue: FairQueue, num_requests: int, tokens: int = 10) -> list[str]:
    """Take requests as a scheduler would, each charged so many prompt tokens."""
    served = []
    for request in queue.candidates(lambda r: 0):
        queue.remove(request)
        queue.charge(request, tokens, 0)
        served.append(request.request_id)
        if len(served) == num_requests:
            break
    return served


def test_keys_take_turns_and_within_a_key_first_come_first_served():
    queue = FairQueue()
    for request_id, adapter in [("a1", "a"), ("a2", "a"), ("a3", "a"), ("b1", "b"), ("c1", "c")]:
        queue.enter(make(request_id, adapter))
    assert serve(queue, 5) == ["a1", "b1", "c1", "a2", "a3"]
    assert len(queue) == 0


def test_tenants_of_one_adapter_are_keys_of_their_own():
    queue = FairQueue()
    for i in range(3):
        queue.enter(make(f"t{i}", "a", tenant="t"))
    queue.enter(make("u0", "a", tenant="u"))
    assert serve(queue, 2) == ["t0", "u0"]


def test_idling_earns_no_credit():
    queue = FairQueue()
    early = make("early", "a")
    queue.enter(early)
    serve(queue, 1)
    queue.leave(early)
    for i in range(20):
        queue.enter(make(f"b{i}", "b"))
    serve(queue, 10)
    queue.enter(make("late1", "a"))
    queue.enter(make("late2", "a"))
    # Key a had 10 tokens of service, key b 110: a starts level with b, not 100 tokens ahead.
    assert serve(queue, 4) in (["b10", "late1", "b11", "late2"], ["late1", "b10", "late2", "b11"])


def test_a_head_that_is_left_in_place_holds_up_its_own_key_only():
    queue = FairQueue()
    for request_id, adapter in [("a1", "a"), ("a2", "a"), ("b1", "b")]:
        queue.enter(make(request_id, adapter))
    assert [r.request_id for r in queue.candidates(lambda r: 0)] == ["a1", "b1"]


def test_preempted_requests_come_back_first_and_handicaps_are_bounded():
    queue = FairQueue()
    first, second = make("a1", "a"), make("a2", "a")
    queue.enter(first)
    queue.enter(second)
    queue.remove(first)
    queue.push(first)
    other = make("b1", "b")
    queue.enter(other)
    queue.charge(first, 50, 0)

    def handicap(request: Request) -> int:
        return 100 if request is other else 0

    assert [r.request_id for r in queue.candidates(handicap)] == ["a1", "b1"]
    queue.charge(first, 51, 0)
    assert [r.request_id for r in queue.candidates(handicap)] == ["b1", "a1"]
    assert set(queue) == {first, second, other}


def test_counters_of_keys_long_gone_are_dropped(monkeypatch):
    monkeypatch.setattr("loraplex.engine.scheduling.fair_queue.NUM_IDLE_COUNTERS", 10)
    queue = FairQueue()
    busy = make("busy", "b")
    queue.enter(busy)
    for i in range(100):
        request = make("r", "a", tenant=str(i))
        queue.enter(request)
        serve(queue, 2)
        queue.leave(request)
        queue.enter(make("busy", "b"))
    assert len(queue._counters) < 25
