"""Waiting requests, ordered so that no tenant and no adapter starves another. No torch.

Virtual token counter (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024): every
(tenant, adapter) has a counter of the service it got, divided by its weight; who got least is
served next. A key that comes back after having had nothing to do starts no lower than the least
counter of those that are busy, so that idling earns no credit.

So nobody starves: while a key waits whose adapter is there, another is only chosen before it as
long as its counter is lower, or higher by less than the handicap; and what runs already runs on.
Its counter gets ahead by at most handicap + max_num_seqs * (the most that one request asks for).
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import NamedTuple

from loraplex.engine.request import OUTPUT_TOKEN_COST, PROMPT_TOKEN_COST, Request

ServiceKey = tuple[str, bytes]

# Counters of keys with nothing to do are kept up to this many before stale ones are dropped.
NUM_IDLE_COUNTERS = 4096


class _Entry(NamedTuple):
    """A waiting request."""

    place: tuple[int, int]
    """(priority, number of arrival)"""
    request: Request
    service: float
    """The most that it may still ask for, when it came."""


class FairQueue:
    """By priority, then first come, first served within a key; least served first between keys."""

    def __init__(self) -> None:
        self._waiting: dict[ServiceKey, list[_Entry]] = {}  # in order
        self._backlogs: dict[ServiceKey, float] = {}
        self._counters: dict[ServiceKey, float] = {}
        self._num_active: dict[ServiceKey, int] = {}
        self._arrivals: dict[Request, int] = {}
        self._num_arrivals = 0
        self._floor = 0.0
        self._num_waiting = 0
        self.backlog = 0.0
        """The most service that the waiting requests may ask for."""
        self.total_service = 0.0
        """Given to all so far."""

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Request]:
        for queue in self._waiting.values():
            yield from (entry.request for entry in queue)

    @property
    def num_keys(self) -> int:
        """Keys with waiting requests."""
        return len(self._waiting)

    def num_waiting_of(self, key: ServiceKey) -> int:
        return len(self._waiting.get(key, ()))

    def backlog_of(self, key: ServiceKey) -> float:
        """The key's part of the backlog."""
        return self._backlogs.get(key, 0.0)

    def enter(self, request: Request) -> None:
        """A new request, which waits from now on; its key is active until it leaves."""
        self.expect(request)
        self.push(request)

    def expect(self, request: Request) -> None:
        """A new request that will be pushed later; its key is active until it leaves."""
        key = request.service_key
        if key not in self._num_active:
            if self._num_active:
                self._floor = min(self._counters[active] for active in self._num_active)
            self._counters[key] = max(self._counters.get(key, 0.0), self._floor)
            self._num_active[key] = 0
        self._num_active[key] += 1
        self._num_arrivals += 1
        self._arrivals[request] = self._num_arrivals

    def leave(self, request: Request) -> None:
        """The request, which waits no longer, is finished."""
        key = request.service_key
        del self._arrivals[request]
        self._num_active[key] -= 1
        if self._num_active[key] > 0:
            return
        del self._num_active[key]
        if not self._num_active:
            self._floor = max(self._floor, self._counters[key])
        if len(self._counters) > len(self._num_active) + NUM_IDLE_COUNTERS:
            self._counters = {
                k: c for k, c in self._counters.items() if k in self._num_active or c > self._floor
            }

    def push(self, request: Request) -> None:
        """Into its queue, where its arrival puts it: one that was running waits before those that
        came later."""
        key = request.service_key
        entry = _Entry(self._place(request), request, request.queued_service)
        insort(self._waiting.setdefault(key, []), entry, key=attrgetter("place"))
        self._num_waiting += 1
        self._add_backlog(key, entry.service)

    def remove(self, request: Request) -> None:
        key = request.service_key
        queue = self._waiting[key]
        entry = queue.pop(bisect_left(queue, self._place(request), key=attrgetter("place")))
        assert entry.request is request
        self._num_waiting -= 1
        self._add_backlog(key, -entry.service)
        if not queue:
            del self._waiting[key], self._backlogs[key]

    def _place(self, request: Request) -> tuple[int, int]:
        return request.wire.service.priority, self._arrivals[request]

    def _add_backlog(self, key: ServiceKey, service: float) -> None:
        self._backlogs[key] = self._backlogs.get(key, 0.0) + service
        self.backlog += service

    def charge(self, request: Request, num_prompt_tokens: int, num_output_tokens: int) -> None:
        """Count service that the request got."""
        service = PROMPT_TOKEN_COST * num_prompt_tokens + OUTPUT_TOKEN_COST * num_output_tokens
        self._counters[request.service_key] += service / request.wire.service.weight
        self.total_service += service

    def candidates(self, handicap: Callable[[Request], int]) -> Iterator[Request]:
        """Heads of the queues, least served first; `handicap` counts as service already got.

        Where the consumer removes a head, its key competes again with the next one; where it
        leaves the head in place, the key is passed over until the next call.
        """
        heap = [self._entry(queue[0].request, handicap) for queue in self._waiting.values()]
        heapq.heapify(heap)
        while heap:
            request = heapq.heappop(heap)[-1]
            yield request
            queue = self._waiting.get(request.service_key)
            if queue and queue[0].request is not request:
                heapq.heappush(heap, self._entry(queue[0].request, handicap))

    def _entry(
        self, request: Request, handicap: Callable[[Request], int]
    ) -> tuple[float, float, str, Request]:
        service = self._counters[request.service_key] + handicap(request)
        return service, request.wire.arrival_time, request.request_id, request
