from __future__ import annotations

import pytest

from loraplex.engine.page_pool import Candidate, CostAwareLRU, PagePool, PageState


class FakeLender:
    """Lends single pages of one state, oldest first."""

    def __init__(self, pool: PagePool, state: PageState, restore_cost: float) -> None:
        self.pool, self.state, self.restore_cost = pool, state, restore_cost
        self.lent: list[tuple[int, int]] = []
        pool.add_lender(self)

    def lend(self, num_pages: int, in_use: PageState) -> list[int]:
        pages = self.pool.allocate(num_pages, in_use)
        assert pages is not None
        self.pool.set_state(pages, self.state)
        self.lent += [(page, self.pool.clock) for page in pages]
        return pages

    def peek_reclaimable(self) -> Candidate | None:
        return Candidate(self.lent[0][1], self.restore_cost) if self.lent else None

    def reclaim(self) -> list[int]:
        return [self.lent.pop(0)[0]]


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
    lender = FakeLender(pool, PageState.KV_CACHED, 1.0)
    assert lender.lend(3, PageState.KV) == [1, 2, 3]
    assert pool.num_available == 5
    assert pool.allocate(2, PageState.KV) == [4, 5]
    assert len(lender.lent) == 3
    assert pool.allocate(2, PageState.KV) == [2, 1]
    assert [page for page, _ in lender.lent] == [3]
    pool.check_integrity()


def test_what_is_cheap_to_restore_goes_before_what_is_dear_unless_it_was_used_lately():
    pool = PagePool(5)
    kv = FakeLender(pool, PageState.KV_CACHED, restore_cost=100.0)
    adapters = FakeLender(pool, PageState.ADAPTER_IDLE, restore_cost=1.0)
    kv.lend(2, PageState.KV)
    pool.clock = 50
    adapters.lend(2, PageState.ADAPTER)
    pool.clock = 51
    pool.allocate(1, PageState.KV)
    assert (len(kv.lent), len(adapters.lent)) == (2, 1)
    assert CostAwareLRU().loss(Candidate(50, 1.0), 51) < CostAwareLRU().loss(
        Candidate(0, 100.0), 51
    )
    # A thousand steps later, KV of long ago is worth less than an adapter used just now.
    adapters.lent[0] = (adapters.lent[0][0], 1000)
    pool.clock = 1000
    pool.allocate(1, PageState.KV)
    assert (len(kv.lent), len(adapters.lent)) == (1, 1)
    pool.check_integrity()


def test_integrity_check_notices_a_page_that_was_lost():
    pool = PagePool(4)
    pool._free.pop()
    with pytest.raises(AssertionError):
        pool.check_integrity()
