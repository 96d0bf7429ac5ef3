"""What goes first, and that nothing is lost whatever the policy says."""

from __future__ import annotations

import heapq
import random

import pytest
from fake_device import expected_tokens, fake_core, make_request, run_to_end, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.engine import core as core_module
from loraplex.engine.config import EngineConfig
from loraplex.engine.core import EngineCore
from loraplex.engine.memory.eviction import HALF_LIFE, POLICIES, CostAware, LentItems
from loraplex.engine.messages import FinishReason, Service

NUM_PAGES = 1000


class RandomPolicy(CostAware):
    """Any order at all, and what is awaited may go first: no order may do harm."""

    def __init__(self, num_pages: int) -> None:
        super().__init__(num_pages)
        self._random = random.Random(num_pages)

    def rank(self, kind, num_uses):
        return self._random.random()


@given(st.lists(st.tuples(st.sampled_from(["add", "take", "pop"]), st.integers(0, 9)), max_size=99))
def test_lent_items_are_those_of_a_sorted_list(actions):
    lent, owner = LentItems(), 1
    expected: list[tuple[int, int, int]] = []
    for number, (action, value) in enumerate(actions):
        if action == "add" and number not in lent:
            lent.add(number, float(value), owner)
            heapq.heappush(expected, (value, number, number))
        elif action == "take" and expected:
            entry = expected.pop(value % len(expected))
            heapq.heapify(expected)
            lent.take(entry[-1])
        elif action == "pop" and expected:
            assert lent.pop() == (heapq.heappop(expected)[-1], owner)
        assert len(lent) == len(expected)
        assert all(item in lent for _, _, item in expected)
    while expected:
        assert lent.pop() == (heapq.heappop(expected)[-1], owner)


def test_what_was_taken_is_forgotten_before_it_fills_memory():
    lent, owner = LentItems(), 1
    for _ in range(10_000):
        lent.add("again and again", 1.0, owner)
        lent.take("again and again")
    assert len(lent._heap) < 100


def policy_with_kinds() -> tuple[CostAware, list]:
    policy = CostAware(NUM_PAGES)
    return policy, [policy.add_kind(cost) for cost in (4.0, 1.0)]


def test_of_equally_likely_ones_the_cheaper_goes_first_until_it_was_used_later():
    policy, (dear, cheap) = policy_with_kinds()
    old = policy.rank(dear, 1)
    assert policy.rank(cheap, 1) < old
    policy.record_reclaimed(int(1.9 * HALF_LIFE * NUM_PAGES))
    assert policy.rank(cheap, 1) < old
    policy.record_reclaimed(int(0.2 * HALF_LIFE * NUM_PAGES))
    assert policy.rank(cheap, 1) > old


def test_what_streams_through_goes_before_what_was_used_again():
    policy, (kind, other) = policy_with_kinds()
    for _ in range(100):
        policy.record_use(kind, 1, 50)
    for num_uses in range(2, 30):
        policy.record_use(kind, num_uses, 50)
    assert policy.rank(kind, 1) < policy.rank(kind, 2) - 3
    assert policy.rank(other, 1) == policy.rank(other, 2), "kinds have experience of their own"


def test_what_is_always_used_twice_and_never_again_goes_before_what_was_used_once():
    policy, (kind, _) = policy_with_kinds()
    for _ in range(100):
        policy.record_use(kind, 1, 50)
        policy.record_use(kind, 2, 50)
    assert policy.rank(kind, 2) < policy.rank(kind, 1) - 3


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(1, 5000), st.integers(1, 200))))
def test_likelihoods_are_shares_and_awaited_things_are_not_below_lent_ones(uses):
    policy, kinds = policy_with_kinds()
    for index, num_uses, num_pages in uses:
        policy.record_use(kinds[index], num_uses, num_pages)
    for kind, cost in zip(kinds, (4.0, 1.0), strict=True):
        for num_uses in (1, 2, 3, 100, 10**9):
            lost = 2 ** policy.rank(kind, num_uses)
            assert 0 < lost <= cost * (1 + 1e-9)
            assert policy.rank(kind, num_uses) <= policy.rank_awaited()


def test_an_unknown_policy_is_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match="eviction_policy='fifo' is not allowed.*'cost_aware', 'lru'"
    ):
        EngineConfig(eviction_policy="fifo")


def test_a_scan_of_adapters_does_not_push_out_the_one_in_use():
    """Under LRU, seven adapters that come once each take the place of the eighth every time."""
    loads = {}
    for policy in POLICIES:
        core = fake_core(40, max_model_len=16, enable_prefix_caching=False, eviction_policy=policy)
        for i in range(80):
            name = "regular" if i % 8 == 0 else f"once-{i}"
            core.add_request(make_request(f"r{i}", [i, 1, 2], 4, name, num_adapter_pages=6))
            run_to_end(core)
        loads[policy] = core.stats()["adapter_loads"]
    assert loads["lru"] == 80
    assert loads["cost_aware"] < 75


@pytest.mark.parametrize("policy", [*POLICIES, "random"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_tokens_and_pages_are_right_whatever_is_evicted(policy, data):
    """Prompts begin alike and adapters come again, in a pool that is too small for them."""
    core = core_of(policy, data.draw(st.integers(20, 40), "num_pages"))
    requests, outputs = [], {}
    for i in range(data.draw(st.integers(1, 25), "num_requests")):
        opening = [data.draw(st.integers(0, 2))] * data.draw(st.integers(1, 24))
        request = make_request(
            f"r{i}",
            [*opening, i % 7],
            data.draw(st.integers(1, 12)),
            data.draw(st.sampled_from([None, "a", "b", "c", f"once-{i}"])),
            num_adapter_pages=5,
            service=Service(tenant=data.draw(st.sampled_from("xy"))),
        )
        core.add_request(request)
        requests.append(request)
        for _ in range(data.draw(st.integers(0, 12))):
            for output in core.step():
                outputs.setdefault(output.request_id, []).append(output)
            core._device.adapter_store.finish_copies()
            core.check_integrity()
    for request_id, more in run_to_end(core).items():
        outputs.setdefault(request_id, []).extend(more)
    for request in requests:
        got = outputs[request.request_id]
        assert got[-1].finish_reason in (FinishReason.LENGTH, FinishReason.STOP)
        assert tokens_of(got) == expected_tokens(request)
    core.check_integrity()


def core_of(policy: str, num_pages: int) -> EngineCore:
    if policy != "random":
        return fake_core(num_pages, max_model_len=40, eviction_policy=policy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(core_module.POLICIES, "lru", RandomPolicy)
        return fake_core(num_pages, max_model_len=40, eviction_policy="lru")
