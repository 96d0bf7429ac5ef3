"""Exact pages and exact order of reclaiming."""

from __future__ import annotations

import pytest
from fake_device import FakeFiles, make_request

from loraplex.engine.adapters.manager import Adapter
from loraplex.engine.lora_request import LoRARequest
from loraplex.engine.memory.eviction import CostAware
from loraplex.engine.memory.kv_manager import KVManager
from loraplex.engine.memory.page_pool import PagePool, PageState
from loraplex.engine.messages import Service
from loraplex.engine.request import Request


def start(kv: KVManager, prompt, adapter: Adapter | None = None, **options) -> Request:
    """A request that has all its prompt computed."""
    request = Request(make_request("r", prompt, max_tokens=8, **options), adapter)
    kv.take_prefix(request, kv.find_prefix(request))
    assert kv.grow(request, request.num_tokens)
    request.num_computed_tokens = request.num_tokens
    kv.key_computed_blocks(request)
    return request


def reclaim(pool: PagePool, num_pages: int) -> list[int]:
    """Fill the pool, and so many pages more: those, in the order in which they were given back."""
    pages = []
    assert pool.allocate(pool.count(PageState.FREE), PageState.KV) is not None
    for _ in range(num_pages):
        pages += pool.allocate(1, PageState.KV) or []
    return pages


@pytest.fixture
def pool() -> PagePool:
    return PagePool(10)


@pytest.fixture
def kv(pool: PagePool) -> KVManager:
    return KVManager(pool, block_size=4, enable_prefix_caching=True, restore_cost=1.0)


def test_full_blocks_are_shared_and_partial_ones_are_not(pool, kv):
    first = start(kv, range(10))
    second = start(kv, range(10))
    assert first.block_table == [1, 2, 3]
    assert second.block_table == [1, 2, 4]
    kv.check_integrity([first, second])
    kv.release(first)
    assert pool.count(PageState.KV) == 3
    kv.release(second)
    assert pool.count(PageState.KV_CACHED) == 2
    assert pool.count(PageState.FREE) == 7
    kv.check_integrity([])


def test_the_tail_of_the_least_recently_used_prefix_is_reclaimed_first(pool, kv):
    old = start(kv, range(8))
    new = start(kv, range(100, 108))
    assert (old.block_table, new.block_table) == ([1, 2], [3, 4])
    kv.release(old)
    pool.clock += 1
    kv.release(new)
    assert reclaim(pool, 4) == [2, 1, 4, 3]


def test_a_hit_makes_a_prefix_young_again(pool, kv):
    for prompt in (range(8), range(100, 108)):
        kv.release(start(kv, prompt))
        pool.clock += 1
    again = start(kv, range(9))
    assert again.block_table[:2] == [1, 2]
    kv.release(again)
    assert reclaim(pool, 4) == [4, 3, 2, 1]


def test_two_computed_the_same_block_and_one_of_them_stays_private(pool, kv):
    both = [Request(make_request(str(i), range(4), 8), None) for i in range(2)]
    for request in both:
        assert kv.grow(request, 4)
        request.num_computed_tokens = 4
        kv.key_computed_blocks(request)
    for request in both:
        kv.release(request)
    assert pool.count(PageState.KV_CACHED) == 1
    kv.check_integrity([])


def test_kv_of_one_adapter_is_never_found_by_another(pool, kv):
    a, b = (Adapter(LoRARequest(n, n), FakeFiles(n, 0), i) for i, n in enumerate("ab"))
    kv.release(start(kv, range(9), a))
    assert kv.find_prefix(Request(make_request("r", range(9), 8), b)) == []
    assert kv.find_prefix(Request(make_request("r", range(9), 8), None)) == []
    assert kv.find_prefix(Request(make_request("r", range(9), 8), a)) == [1, 2]


def test_who_does_not_know_the_salt_finds_nothing(pool, kv):
    def first_block(**options) -> int:
        return start(kv, range(5), **options).block_table[0]

    mine, theirs = (Service(cache_salt=salt) for salt in ("a", "b"))
    blocks = [first_block(), first_block(service=mine), first_block(service=theirs)]
    assert len(set(blocks)) == 3
    assert blocks == [first_block(), first_block(service=mine), first_block(service=theirs)]


def test_growing_beyond_the_pool_changes_nothing(pool, kv):
    request = start(kv, range(30))
    assert not kv.grow(request, 41)
    assert len(request.block_table) == 8
    kv.check_integrity([request])


def test_a_block_that_is_computed_again_goes_on_counting_its_uses():
    pool = PagePool(4, CostAware(4))
    kv = KVManager(pool, block_size=4, enable_prefix_caching=True, restore_cost=1.0)
    for _ in range(2):
        kv.release(start(kv, range(4)))
        pool.free(pool.allocate(3, PageState.KV) or [])  # Takes its page.
        assert kv.find_prefix(Request(make_request("r", range(5), 8), None)) == []
    kv.release(start(kv, range(4)))
    assert [kv._num_uses[page] for page in kv._hash_of] == [3]
    kv.check_integrity([])
