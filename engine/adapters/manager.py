"""Which adapters are in the pool, which are on their way, and who uses them. No torch.

An adapter's life in the pool:

    ABSENT --start--> COPYING --done--> RESIDENT --reclaimed--> ABSENT

Before a copy can start, its image must be in host memory; the store reads it from disk in threads
of its own. Nothing here waits: `num_pages` says whether it is, and is called again next step. An
adapter is RESIDENT at once where the device has the next step wait for the copy, which is done
before that step begins, as a rule: so many pages a step.

A version that nobody can ask for any more is unloaded: its pages, its image and its KV go.
"""

from __future__ import annotations

import enum
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

import numpy as np
import numpy.typing as npt

from loraplex.engine.adapters.counts import AdapterTally
from loraplex.engine.adapters.store import AdapterFiles, AdapterStore, Identity, Tier
from loraplex.engine.lora_request import LoRARequest
from loraplex.engine.memory.page_pool import PagePool, PageState
from loraplex.engine.request import Request, RequestStatus
from loraplex.lora.spec import AdapterTraits


class Residency(enum.Enum):
    ABSENT = enum.auto()
    COPYING = enum.auto()
    RESIDENT = enum.auto()


class Adapter:
    """One version of an adapter, as the pool sees it."""

    __slots__ = (
        "copy",
        "copy_interval",
        "files",
        "identities",
        "lora_request",
        "num_holds",
        "num_requests",
        "num_users",
        "num_uses",
        "page_table",
        "pages",
        "pinned_tier",
        "read_interval",
        "residency",
        "sort_key",
        "traits",
        "version",
    )

    def __init__(self, lora_request: LoRARequest, files: AdapterFiles, sort_key: int) -> None:
        self.lora_request = lora_request
        """The first that asked for it."""
        self.files = files
        self.version = files.key
        self.sort_key = sort_key
        """Rows of a batch are sorted by this, so that an adapter's rows are one segment."""
        self.residency = Residency.ABSENT
        self.pages: list[int] = []
        self.page_table: npt.NDArray[np.int32] = np.empty(0, np.int32)
        self.traits = AdapterTraits(max_rank=0, module_mask=0)
        self.identities: set[Identity] = set()
        """By which new requests get it, as the resolver knows."""
        self.num_requests = 0
        """Unfinished requests for it."""
        self.num_users = 0
        """Those of them that run."""
        self.num_holds = 0
        """Operations that want it to stay while they go on."""
        self.pinned_tier: Tier | None = None
        """Where it is never evicted from."""
        self.num_uses = 0
        """Requests that used it so far."""
        self.copy: Future[None] | None = None
        self.read_interval = self.copy_interval = 0.0, 0.0
        """When it was last read into host memory, and copied to the pool: time.monotonic()."""

    @property
    def is_wanted(self) -> bool:
        """Whether a request has it, or may still get it."""
        return bool(self.num_requests or self.num_holds or self.identities or self.pinned_tier)

    @property
    def is_in_use(self) -> bool:
        """Whether its pages, if it has any, must stay."""
        return self.num_users > 0 or self.pinned_tier == "pool"


class AdapterManager:
    """Brings adapters into the pool, counts their users, and gives idle ones back."""

    def __init__(
        self,
        pool: PagePool,
        store: AdapterStore,
        restore_cost: float,
        num_awaited_pages: int,
        on_unload: Callable[[bytes], None],
    ) -> None:
        """restore_cost: cost of copying one page in from the host (see Kind).

        num_awaited_pages: pages that a step may wait for to be copied.
        on_unload is told of versions that will not be used again.
        """
        self._pool = pool
        self._store = store
        self._lender = pool.add_lender(self)
        self._kind = pool.policy.add_kind(restore_cost)
        self._num_awaited_pages = num_awaited_pages
        # What is left of those for the next step.
        self._num_awaitable = num_awaited_pages
        self._on_unload = on_unload
        self._adapters: dict[bytes, Adapter] = {}
        self._num_created = 0
        self._copying: list[Adapter] = []
        self.num_loads = 0
        self.num_evictions = 0
        self.num_pinned_pages = 0
        self.tally = AdapterTally()

    def adopt(self, lora_request: LoRARequest, files: AdapterFiles) -> Adapter:
        """The adapter of these files, which it may not have yet, or have had before."""
        self.tally[lora_request.lora_name].downloads += files.num_downloads
        adapter = self._adapters.get(files.key)
        if adapter is None:
            adapter = self._adapters[files.key] = Adapter(lora_request, files, self._num_created)
            self._num_created += 1
        elif adapter.files is not files:
            adapter.files.close()
            adapter.files = files
        return adapter

    def find(self, version: bytes) -> Adapter | None:
        return self._adapters.get(version)

    def __iter__(self) -> Iterator[Adapter]:
        return iter(self._adapters.values())

    def enter(self, adapter: Adapter, name: str) -> None:
        """A request for it by this name waits from now on: have its image read into host memory, if
        it is not there. Errors wait for `num_pages`."""
        adapter.num_requests += 1
        counts = self.tally[name]
        if adapter.residency is Residency.RESIDENT:
            counts.hits += 1
        else:
            counts.misses += 1
        if adapter.residency is not Residency.ABSENT:
            adapter.files.close()
            return
        try:
            self._store.num_pages(adapter.files)
        except ValueError:
            return

    def leave(self, adapter: Adapter) -> None:
        """A request for it is finished."""
        adapter.num_requests -= 1
        self.unload_unused(adapter)

    def unload_unused(self, adapter: Adapter) -> None:
        """Free all that a version takes, if no request has it and none can get it any more."""
        if adapter.is_wanted or adapter.residency is Residency.COPYING:
            return
        if adapter.residency is Residency.RESIDENT:
            self._pool.take_back(adapter)
            self._pool.free(self._take_pages(adapter))
        adapter.files.close()
        del self._adapters[adapter.version]
        self._store.drop(adapter.version)
        self._on_unload(adapter.version)

    def num_pages(self, adapter: Adapter) -> int | None:
        """Pages the adapter takes; None while it is read. Raises ValueError if it can't be."""
        if adapter.residency is not Residency.ABSENT:
            return len(adapter.pages)
        return self._store.num_pages(adapter.files)

    def start_copy(self, adapter: Adapter, num_pages: int) -> bool | None:
        """Take pages for an adapter in host memory and begin to fill them; False if none left.

        True: the next step waits for the copy, so that the adapter is there. None: it does not.
        """
        assert adapter.residency is Residency.ABSENT
        pages = self._pool.allocate(num_pages, PageState.ADAPTER)
        if pages is None:
            return False
        adapter.pages = sorted(pages)
        adapter.page_table = np.array(adapter.pages, np.int32)
        adapter.traits = self._store.traits(adapter.version)
        # The step before this one may be in flight, not one before that.
        after_steps = self._pool.last_used(pages) >= self._pool.clock - 1
        is_awaited = num_pages <= self._num_awaitable
        copy = self._store.copy_to_pages(adapter.version, adapter.pages, after_steps, is_awaited)
        self.num_loads += 1
        self.tally[adapter.lora_request.lora_name].loads += 1
        adapter.read_interval = self._store.read_interval(adapter.version)
        adapter.copy_interval = time.monotonic(), math.inf
        if is_awaited:
            self._num_awaitable -= num_pages
            self._make_resident(adapter)
            return True
        adapter.residency = Residency.COPYING
        adapter.copy = copy
        self._copying.append(adapter)
        return None

    def finish_copies(self) -> None:
        """Make adapters whose copy is done resident; called once a step, at its beginning."""
        self._num_awaitable = self._num_awaited_pages
        still_copying = []
        for adapter in self._copying:
            assert adapter.copy is not None
            if not adapter.copy.done():
                still_copying.append(adapter)
                continue
            adapter.copy.result()
            adapter.copy = None
            self._make_resident(adapter)
            self.unload_unused(adapter)
        self._copying = still_copying

    def _make_resident(self, adapter: Adapter) -> None:
        adapter.residency = Residency.RESIDENT
        adapter.copy_interval = adapter.copy_interval[0], time.monotonic()
        self._lend(adapter, self._pool.policy.rank_awaited())

    def acquire(self, adapter: Adapter) -> None:
        """Count one more running request that uses a resident adapter."""
        assert adapter.residency is Residency.RESIDENT
        self._take_back(adapter)
        adapter.num_users += 1

    def release(self, adapter: Adapter) -> None:
        policy = self._pool.policy
        adapter.num_users -= 1
        adapter.num_uses += 1
        policy.record_use(self._kind, adapter.num_uses, len(adapter.pages))
        if not adapter.is_in_use:
            self._lend(adapter, policy.rank(self._kind, adapter.num_uses))

    def pin(self, adapter: Adapter, tier: Tier) -> None:
        """Never evict it from where it is. Raises ValueError if host memory has no room for it."""
        if adapter.pinned_tier == tier:
            return
        if tier == "host":
            self._store.pin(adapter.version)
        else:
            self._take_back(adapter)
        self.unpin(adapter)
        adapter.pinned_tier = tier
        self.num_pinned_pages += len(adapter.pages) if tier == "pool" else 0

    def unpin(self, adapter: Adapter) -> None:
        """It may be evicted again."""
        tier, adapter.pinned_tier = adapter.pinned_tier, None
        if tier == "host":
            self._store.unpin(adapter.version)
        elif tier == "pool":
            self.num_pinned_pages -= len(adapter.pages)
            if not adapter.is_in_use:
                self._lend(adapter, self._pool.policy.rank_awaited())

    def _take_back(self, adapter: Adapter) -> None:
        """Its pages are in use from now on."""
        if not adapter.is_in_use:
            self._pool.take_back(adapter)
            self._pool.set_state(adapter.pages, PageState.ADAPTER)

    def _lend(self, adapter: Adapter, rank: float) -> None:
        self._pool.lend(adapter, rank, self._lender)
        self._pool.set_state(adapter.pages, PageState.ADAPTER_IDLE)

    def reclaim(self, adapter: Adapter) -> list[int]:
        self.num_evictions += 1
        self.tally[adapter.lora_request.lora_name].evictions += 1
        return self._take_pages(adapter)

    def _take_pages(self, adapter: Adapter) -> list[int]:
        pages, adapter.pages = adapter.pages, []
        adapter.page_table = np.empty(0, np.int32)
        adapter.residency = Residency.ABSENT
        return pages

    def tier(self, adapter: Adapter) -> str:
        """The nearest place where it is: "pool", "host" or "disk"."""
        if adapter.residency is Residency.RESIDENT:
            return "pool"
        return "host" if self._store.holds(adapter.version) else "disk"

    def num_resident(self) -> int:
        return sum(a.residency is Residency.RESIDENT for a in self._adapters.values())

    def check_integrity(self, requests: Sequence[Request]) -> None:
        """Adapters and their pages are exactly as these unfinished requests say."""
        num_requests = Counter(r.adapter for r in requests)
        num_users = Counter(r.adapter for r in requests if r.status is RequestStatus.RUNNING)
        owned: set[int] = set()
        for version, adapter in self._adapters.items():
            assert adapter.version == version
            assert adapter.num_users == num_users[adapter], adapter.lora_request
            assert adapter.num_requests == num_requests[adapter], adapter.lora_request
            is_copying = adapter.residency is Residency.COPYING
            assert adapter.is_wanted or is_copying, adapter.lora_request
            assert (adapter.residency is Residency.ABSENT) == (not adapter.pages)
            assert owned.isdisjoint(adapter.pages)
            owned.update(adapter.pages)
            is_idle = adapter.residency is Residency.RESIDENT and not adapter.is_in_use
            assert is_idle == self._pool.is_lent(adapter)
            expected = PageState.ADAPTER_IDLE if is_idle else PageState.ADAPTER
            assert all(self._pool.state(page) is expected for page in adapter.pages)
        pinned = [a for a in self._adapters.values() if a.pinned_tier == "pool"]
        assert self.num_pinned_pages == sum(len(a.pages) for a in pinned)
        states = PageState.ADAPTER, PageState.ADAPTER_IDLE
        assert len(owned) == sum(self._pool.count(state) for state in states)
