from __future__ import annotations

import pytest

from loraplex.engine.memory.page_pool import PagePool, PageState


class FakeLender:
    """Lends single pages of one state by a rank."""

    def __init__(self, pool: PagePool, state: PageState) -> None:
        self.pool, self.state = pool, state
        self.lent: list[int] = []
        self.number = pool.add_lender(self)

    def lend(self, num_pages: int, in_use: PageState, rank: float = 0.0) -> list[int]:
        pages = self.pool.allocate(num_pages, in_use)
        assert pages is not None
        self.pool.set_state(pages, self.state)
        for page in pages:
            self.pool.lend(page, rank, self.number)
        self.lent += pages
        return pages

    def reclaim(self, item: int) -> list[int]:
        self.lent.remove(item)
        return [item]


def test_pages_are_given_in_order_and_page_0_never():
    pool = PagePool(5)
    assert pool.allocate(3, PageState.KV) == [1, 2, 3]
    assert pool.allocate(2, PageState.KV) is None
    assert pool.count(PageState.FREE) == 1
    pool.free([2])
    assert pool.allocate(2, PageState.ADAPTER) == [2, 4]
    pool.check_integrity()


def test_lent_pages_count_as_available_and_are_reclaimed_only_when_needed():
    pool = PagePool(6)
    lender = FakeLender(pool, PageState.KV_CACHED)
    assert lender.lend(3, PageState.KV) == [1, 2, 3]
    assert pool.num_available == 5
    assert pool.allocate(2, PageState.KV) == [4, 5]
    assert len(lender.lent) == 3
    assert pool.allocate(2, PageState.KV) == [2, 1]
    assert lender.lent == [3]
    pool.check_integrity()


def test_the_lowest_rank_goes_first_whosever_it_is_and_what_is_taken_back_stays():
    pool = PagePool(6)
    kv = FakeLender(pool, PageState.KV_CACHED)
    adapters = FakeLender(pool, PageState.ADAPTER_IDLE)
    kv.lend(2, PageState.KV, rank=2.0)
    adapters.lend(2, PageState.ADAPTER, rank=1.0)
    assert kv.lend(1, PageState.KV, rank=0.0) == [5]
    pool.take_back(3)
    pool.set_state([3], PageState.ADAPTER)
    assert not pool.is_lent(3)
    assert pool.allocate(3, PageState.KV) == [1, 4, 5]
    assert (kv.lent, adapters.lent) == ([2], [3])
    assert pool.allocate(2, PageState.KV) is None
    pool.check_integrity()


def test_integrity_check_notices_a_page_that_was_lost():
    pool = PagePool(4)
    pool._free.pop()
    with pytest.raises(AssertionError):
        pool.check_integrity()
