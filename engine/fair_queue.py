"""Waiting requests, ordered so that no tenant and no adapter starves another. No torch.

Virtual token counter (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024): every
(tenant, adapter) has a counter of the service it got; who got least is served next. A key that
comes back after having had nothing to do starts no lower than the least counter of those that
are busy, so that idling earns no credit.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator

from loraplex.engine.request import Request

ServiceKey = tuple[str, bytes]

# A generated token costs a pass over the weights of its own, a prompt token shares one.
PROMPT_TOKEN_COST = 1
OUTPUT_TOKEN_COST = 2
# Counters of keys with nothing to do are kept up to this many before stale ones are dropped.
NUM_IDLE_COUNTERS = 4096


class FairQueue:
    """First come, first served within a key; least served first between keys."""

    def __init__(self) -> None:
        self._waiting: dict[ServiceKey, deque[Request]] = {}
        self._counters: dict[ServiceKey, int] = {}
        self._num_active: dict[ServiceKey, int] = {}
        self._floor = 0
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Request]:
        for queue in self._waiting.values():
            yield from queue

    def enter(self, request: Request) -> None:
        """A new request; its key is active until it leaves."""
        key = request.service_key
        if key not in self._num_active:
            if self._num_active:
                self._floor = min(self._counters[active] for active in self._num_active)
            self._counters[key] = max(self._counters.get(key, 0), self._floor)
            self._num_active[key] = 0
        self._num_active[key] += 1
        self._waiting.setdefault(key, deque()).append(request)
        self._num_waiting += 1

    def leave(self, request: Request) -> None:
        """The request, which waits no longer, is finished."""
        key = request.service_key
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

    def push_front(self, request: Request) -> None:
        """Back to the head of its queue: it was running, and has waited already."""
        self._waiting.setdefault(request.service_key, deque()).appendleft(request)
        self._num_waiting += 1

    def remove(self, request: Request) -> None:
        queue = self._waiting[request.service_key]
        queue.remove(request)
        self._num_waiting -= 1
        if not queue:
            del self._waiting[request.service_key]

    def charge(self, request: Request, num_prompt_tokens: int, num_output_tokens: int) -> None:
        """Count service that the request got."""
        self._counters[request.service_key] += (
            PROMPT_TOKEN_COST * num_prompt_tokens + OUTPUT_TOKEN_COST * num_output_tokens
        )

    def candidates(self, handicap: Callable[[Request], int]) -> Iterator[Request]:
        """Heads of the queues, least served first; `handicap` counts as service already got.

        Where the consumer removes a head, its key competes again with the next one; where it
        leaves the head in place, the key is passed over until the next call.
        """
        heap = [self._entry(queue[0], handicap) for queue in self._waiting.values()]
        heapq.heapify(heap)
        while heap:
            request = heapq.heappop(heap)[-1]
            yield request
            queue = self._waiting.get(request.service_key)
            if queue and queue[0] is not request:
                heapq.heappush(heap, self._entry(queue[0], handicap))

    def _entry(
        self, request: Request, handicap: Callable[[Request], int]
    ) -> tuple[int, float, str, Request]:
        service = self._counters[request.service_key] + handicap(request)
        return service, request.wire.arrival_time, request.request_id, request
