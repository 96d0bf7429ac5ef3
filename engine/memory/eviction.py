"""Which lent pages are reclaimed first: one policy over idle adapters and cached KV. No torch.

What a lender keeps without a user gets a rank when it is lent, and the lowest rank goes first; of
equal ones, what was lent first. A rank does not change while the item stays lent, so that a heap
keeps the order: lending, taking back and reclaiming cost O(log n).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable
from typing import Any, Protocol

# Turnovers of the pool without a use after which the next one is half as likely.
HALF_LIFE = 1.0
# Of the pool: of so many pages, all used again, is the experience that a class starts with.
PRIOR_SHARE = 1 / 50
# Classes of uses: 1, 2 to 3, 4 to 7 and so on; the last has no end.
NUM_CLASSES = 12


class Kind:
    """What a policy knows of all that a lender lends."""

    __slots__ = ("log_cost", "num_again", "num_used")

    def __init__(self, restore_cost: float) -> None:
        """restore_cost: of a page, to bring it back; only ratios between kinds matter."""
        self.log_cost = math.log2(restore_cost)
        self.num_used = [0.0] * NUM_CLASSES
        self.num_again = [0.0] * NUM_CLASSES
        """By class: pages that were used for a time of that class, and those of them that were used
        again; fading."""


class EvictionPolicy(Protocol):
    """Ranks what is lent."""

    def add_kind(self, restore_cost: float) -> Kind:
        """A new lender's kind of items."""

    def record_use(self, kind: Kind, num_uses: int, num_pages: int = 1) -> None:
        """So many pages were used together, for the num_uses-th time."""

    def rank(self, kind: Kind, num_uses: int) -> float:
        """The rank of an item that is lent now, after so many uses."""

    def rank_awaited(self) -> float:
        """The rank of an item that is lent now, but was brought for somebody who will come."""

    def record_reclaimed(self, num_pages: int) -> None:
        """So many pages were reclaimed."""


class LRU:
    """What was lent first goes first, whatever it is."""

    def __init__(self, num_pages: int) -> None:
        pass

    def add_kind(self, restore_cost: float) -> Kind:
        return Kind(restore_cost)

    def record_use(self, kind: Kind, num_uses: int, num_pages: int = 1) -> None:
        pass

    def rank(self, kind: Kind, num_uses: int) -> float:
        return 0.0

    def rank_awaited(self) -> float:
        return 0.0

    def record_reclaimed(self, num_pages: int) -> None:
        pass


class CostAware:
    """What costs least to bring back, times how likely it is used again, goes first.

    The likelihood is what experience says of its kind: the share that was used again of what had
    been used as often. It halves with every HALF_LIFE turnovers of the pool that pass without a use
    (a turnover: as many pages reclaimed as there are). All fade alike, so that the order among lent
    items stays.
    """

    def __init__(self, num_pages: int) -> None:
        """num_pages: of the pool."""
        self._num_pages = num_pages
        self._now = 0.0
        self._most_log_cost = -math.inf

    def add_kind(self, restore_cost: float) -> Kind:
        kind = Kind(restore_cost)
        prior = PRIOR_SHARE * self._num_pages
        kind.num_used = [prior] * NUM_CLASSES
        kind.num_again = [prior] * NUM_CLASSES
        self._most_log_cost = max(self._most_log_cost, kind.log_cost)
        return kind

    def record_use(self, kind: Kind, num_uses: int, num_pages: int = 1) -> None:
        if num_uses > 1:
            kind.num_again[_class_of(num_uses - 1)] += num_pages
        index = _class_of(num_uses)
        kind.num_used[index] += num_pages
        if kind.num_used[index] > self._num_pages:
            kind.num_used[index] /= 2
            kind.num_again[index] /= 2

    def rank(self, kind: Kind, num_uses: int) -> float:
        index = _class_of(num_uses)
        likelihood = min(kind.num_again[index] / kind.num_used[index], 1.0)
        return self._now + math.log2(likelihood) + kind.log_cost

    def rank_awaited(self) -> float:
        return self._now + self._most_log_cost

    def record_reclaimed(self, num_pages: int) -> None:
        self._now += num_pages / (self._num_pages * HALF_LIFE)


def _class_of(num_uses: int) -> int:
    return min(num_uses.bit_length(), NUM_CLASSES) - 1


POLICIES: dict[str, type[LRU] | type[CostAware]] = {"cost_aware": CostAware, "lru": LRU}


class Lender(Protocol):
    """A client of the pool that keeps unused pages for later and gives them back when asked."""

    def reclaim(self, item: Any) -> list[int]:
        """Forget a lent item and return its pages, at least one."""


_Entry = tuple[float, int, Hashable, int]


class LentItems:
    """Items by rank, the first lent of equal ones first."""

    def __init__(self) -> None:
        # (rank, how many were added before, item, lender). Lenders by number: of tuples that hold
        # nothing but numbers the garbage collector soon takes no notice.
        self._entries: dict[Hashable, _Entry] = {}
        # With entries that were taken since, which are passed over when they come up.
        self._heap: list[_Entry] = []
        self._num_added = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, item: Hashable) -> bool:
        return item in self._entries

    def add(self, item: Hashable, rank: float, lender: int) -> None:
        """lender: its number."""
        self._num_added += 1
        self._entries[item] = entry = (rank, self._num_added, item, lender)
        heapq.heappush(self._heap, entry)
        if len(self._heap) > 2 * len(self._entries) + 64:
            self._heap = list(self._entries.values())
            heapq.heapify(self._heap)

    def take(self, item: Hashable) -> None:
        del self._entries[item]

    def pop(self) -> tuple[Hashable, int]:
        """The lowest item, and the number of the lender whose it is. There must be one."""
        while True:
            entry = heapq.heappop(self._heap)
            _, _, item, lender = entry
            if self._entries.get(item) is entry:
                del self._entries[item]
                return item, lender
