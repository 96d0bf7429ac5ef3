"""Who owns which page of the pool. Pure bookkeeping: the bytes live elsewhere, and no torch here.

KV cache and adapters draw from one free list. A page is in exactly one state:

    FREE          nobody's
    KV            holds tokens of at least one running request
    KV_CACHED     holds tokens of a prefix that nobody runs now; lent, may be reclaimed
    ADAPTER       holds a part of an adapter that is being copied in or is used by a request
    ADAPTER_IDLE  holds a part of an adapter that nobody uses now; lent, may be reclaimed

Page 0 is scratch and in no state: padded slots write there.
"""

from __future__ import annotations

import enum
from collections.abc import Hashable, Sequence
from weakref import ref

from loraplex.engine.memory.eviction import LRU, EvictionPolicy, Lender, LentItems


class PageState(enum.IntEnum):
    FREE = 0
    KV = 1
    KV_CACHED = 2
    ADAPTER = 3
    ADAPTER_IDLE = 4


IN_USE = PageState.KV, PageState.ADAPTER


class PagePool:
    """The free list and the state of every page."""

    def __init__(self, num_pages: int, policy: EvictionPolicy | None = None) -> None:
        """policy: of what is lent; least recently used first, if none is given."""
        if num_pages < 2:
            raise ValueError(
                f"num_pages={num_pages} is not allowed: page 0 is scratch, so 2 or more"
            )
        self.num_pages = num_pages
        self.clock = 0
        self.policy: EvictionPolicy = policy or LRU(num_pages)
        self._free = list(range(num_pages - 1, 0, -1))
        self._states = bytearray(num_pages)
        self._last_used = [-1] * num_pages  # The clock when a page that was in use was given up.
        self._counts = [0] * len(PageState)
        self._counts[PageState.FREE] = num_pages - 1
        # Weakly, since they hold the pool: what is no circle is gone with the engine at once, and
        # with it the model, without the garbage collector, which engines keep from looking at it.
        self._lenders: list[ref[Lender]] = []
        self._lent = LentItems()

    def add_lender(self, lender: Lender) -> int:
        """Its number, by which it lends."""
        self._lenders.append(ref(lender))
        return len(self._lenders) - 1

    def count(self, state: PageState) -> int:
        return self._counts[state]

    @property
    def num_usable(self) -> int:
        """All pages but the scratch page."""
        return self.num_pages - 1

    @property
    def num_available(self) -> int:
        """Pages that `allocate` could give now: free ones and lent ones."""
        counts = self._counts
        return counts[PageState.FREE] + counts[PageState.KV_CACHED] + counts[PageState.ADAPTER_IDLE]

    def allocate(self, num_pages: int, state: PageState) -> list[int] | None:
        """Take pages, reclaiming lent ones where the free ones do not suffice.

        Returns None, and changes nothing, if there are not that many.
        """
        if num_pages > self.num_available:
            return None
        while len(self._free) < num_pages:
            self._reclaim(self._lent)
        pages = [self._free.pop() for _ in range(num_pages)]
        self.set_state(pages, state)
        return pages

    def free(self, pages: Sequence[int]) -> None:
        self.set_state(pages, PageState.FREE)
        self._free.extend(pages)

    def set_state(self, pages: Sequence[int], state: PageState) -> None:
        states, counts = self._states, self._counts
        is_given_up = state not in IN_USE
        for page in pages:
            if is_given_up and states[page] in IN_USE:
                self._last_used[page] = self.clock
            counts[states[page]] -= 1
            states[page] = state
        counts[state] += len(pages)

    def state(self, page: int) -> PageState:
        return PageState(self._states[page])

    def last_used(self, pages: Sequence[int]) -> int:
        """The clock when the last of these was given up by who used it; -1 if all are new."""
        return max(self._last_used[page] for page in pages)

    def lend(self, item: Hashable, rank: float, lender: int) -> None:
        """The item's pages, whose state says so, may be reclaimed from now on.

        item: what the lender knows them by. rank: by the policy. lender: its number.
        """
        self._lent.add(item, rank, lender)

    def take_back(self, item: Hashable) -> None:
        """The item is in use again."""
        self._lent.take(item)

    def is_lent(self, item: Hashable) -> bool:
        return item in self._lent

    def _reclaim(self, lent: LentItems) -> None:
        """Free the pages of the lowest item."""
        item, lender = lent.pop()
        owner = self._lenders[lender]()
        assert owner is not None
        pages = owner.reclaim(item)
        self.policy.record_reclaimed(len(pages))
        self.free(pages)

    def check_integrity(self) -> None:
        """The states sum to the total, and the free list is exactly the free pages."""
        assert sum(self._counts) == self.num_usable, self._counts
        for state in PageState:
            assert self._counts[state] == self._states[1:].count(state), state
        assert len(set(self._free)) == len(self._free) == self._counts[PageState.FREE]
        assert all(self._states[page] == PageState.FREE for page in self._free)
        assert 0 not in self._free
