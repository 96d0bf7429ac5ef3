"""What the one pool is compared with: memory split between KV and adapters once for all."""

from __future__ import annotations

from collections.abc import Hashable

from loraplex.engine.memory.eviction import EvictionPolicy, LentItems
from loraplex.engine.memory.page_pool import PagePool, PageState


class SplitPool(PagePool):
    """A PagePool in which each side takes, keeps and reclaims pages of its own share only."""

    def __init__(self, num_pages: int, policy: EvictionPolicy, adapter_share: float) -> None:
        """adapter_share: of all pages, for adapters; the others are for KV."""
        super().__init__(num_pages, policy)
        num_adapter_pages = int(adapter_share * self.num_usable)
        self._limits = {
            PageState.KV: self.num_usable - num_adapter_pages,
            PageState.ADAPTER: num_adapter_pages,
        }
        self._lent_of = {PageState.KV: LentItems(), PageState.ADAPTER: LentItems()}

    @property
    def num_available(self) -> int:
        """Pages of KV's share that are free or lent: what requests are admitted by."""
        return self._limits[PageState.KV] - self.count(PageState.KV)

    def allocate(self, num_pages: int, state: PageState) -> list[int] | None:
        lent_state = PageState.KV_CACHED if state is PageState.KV else PageState.ADAPTER_IDLE
        if self.count(state) + num_pages > self._limits[state]:
            return None
        while self.count(state) + self.count(lent_state) + num_pages > self._limits[state]:
            self._reclaim(self._lent_of[state])
        pages = [self._free.pop() for _ in range(num_pages)]
        self.set_state(pages, state)
        return pages

    def lend(self, item: Hashable, rank: float, lender: int) -> None:
        self._lent_of[self._side(item)].add(item, rank, lender)

    def take_back(self, item: Hashable) -> None:
        self._lent_of[self._side(item)].take(item)

    def is_lent(self, item: Hashable) -> bool:
        return item in self._lent_of[self._side(item)]

    def _side(self, item: Hashable) -> PageState:
        """Blocks are lent by their page."""
        return PageState.KV if isinstance(item, int) else PageState.ADAPTER
