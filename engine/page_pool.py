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
from collections.abc import Sequence
from typing import NamedTuple, Protocol


class PageState(enum.IntEnum):
    FREE = 0
    KV = 1
    KV_CACHED = 2
    ADAPTER = 3
    ADAPTER_IDLE = 4


IN_USE = PageState.KV, PageState.ADAPTER


class Candidate(NamedTuple):
    """The pages a lender would give back next, as the policy sees them."""

    last_used: int
    """The pool's clock when they were last used."""
    restore_cost: float
    """Cost to bring them back, per page; only ratios between lenders matter."""


class Lender(Protocol):
    """A client of the pool that keeps unused pages for later and gives them back when asked."""

    def peek_reclaimable(self) -> Candidate | None:
        """What `reclaim` would give back next; None if there is nothing."""

    def reclaim(self) -> list[int]:
        """Forget the candidate and return its pages, at least one."""


class CostAwareLRU:
    """Reclaim what is cheapest to bring back for how soon it is likely wanted again.

    The longer something has not been used, the longer it will likely go on so: the cost of losing
    a page is restore_cost / idle time, and the lowest goes first.
    """

    def loss(self, candidate: Candidate, now: int) -> float:
        return candidate.restore_cost / (now - candidate.last_used + 1)


class PagePool:
    """The free list and the state of every page."""

    def __init__(self, num_pages: int, policy: CostAwareLRU | None = None) -> None:
        if num_pages < 2:
            raise ValueError(
                f"num_pages={num_pages} is not allowed: page 0 is scratch, so 2 or more"
            )
        self.num_pages = num_pages
        self.clock = 0
        self._policy = policy or CostAwareLRU()
        self._free = list(range(num_pages - 1, 0, -1))
        self._states = bytearray(num_pages)
        self._last_used = [-1] * num_pages  # The clock when a page that was in use was given up.
        self._counts = [0] * len(PageState)
        self._counts[PageState.FREE] = num_pages - 1
        self._lenders: list[Lender] = []

    def add_lender(self, lender: Lender) -> None:
        self._lenders.append(lender)

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
            self._reclaim_cheapest()
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

    def _reclaim_cheapest(self) -> None:
        offers = [(c, lender) for lender in self._lenders if (c := lender.peek_reclaimable())]
        assert offers, "pages are lent, but no lender gives one back"
        _, lender = min(offers, key=lambda offer: self._policy.loss(offer[0], self.clock))
        self.free(lender.reclaim())

    def check_integrity(self) -> None:
        """The states sum to the total, and the free list is exactly the free pages."""
        assert sum(self._counts) == self.num_usable, self._counts
        for state in PageState:
            assert self._counts[state] == self._states[1:].count(state), state
        assert len(set(self._free)) == len(self._free) == self._counts[PageState.FREE]
        assert all(self._states[page] == PageState.FREE for page in self._free)
        assert 0 not in self._free
