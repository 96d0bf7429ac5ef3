"""Refuses requests at once that would wait too long, and ends those that do. No torch."""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

from loraplex.engine.errors import RequestError
from loraplex.engine.request import Request, RequestStatus
from loraplex.engine.scheduling.fair_queue import FairQueue

# Of the rate at which service was given lately: what is older than this counts half.
RATE_HALF_LIFE_SECONDS = 10.0
# A queue is full for everyone at this multiple of its limit.
FULL_FOR_ALL = 2


class Admission:
    """Bounds the queue in length and in time."""

    def __init__(
        self,
        queue: FairQueue,
        max_num_waiting: int | None,
        max_queue_seconds: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """max_queue_seconds: for requests that say nothing of their own. None: no bound."""
        self._queue = queue
        self._max_num_waiting = max_num_waiting
        self._max_queue_seconds = max_queue_seconds
        self._clock = clock
        self._deadlines: list[tuple[float, str, Request]] = []
        # Service given while requests waited, and the time that took, both fading.
        self._service = self._seconds = 0.0
        self._last_step: tuple[float, float] | None = None

    def check(self, request: Request) -> None:
        """Raises RequestError 429 for a request that would not be served in time.

        A queue of max_num_waiting takes a request whose tenant and adapter have none waiting all
        the same, up to twice as many in all: who floods the queue does not lock out the others.
        """
        num_waiting, limit = len(self._queue), self._max_num_waiting
        if limit is not None and num_waiting >= limit:
            is_alone = self._queue.num_waiting_of(request.service_key) == 0
            if not is_alone or num_waiting >= FULL_FOR_ALL * limit:
                self._refuse_busy(num_waiting)
        allowed = self._allowed_seconds(request)
        expected = self.expected_wait(request)
        if allowed is not None and expected > allowed:
            raise RequestError(
                f"max_queue_seconds={allowed:g} can't be kept: the request would wait for about "
                f"{expected:.0f} seconds; try again later",
                status=429,
                retry_after=max(1.0, expected - allowed),
            )

    def check_fetching(self, num_fetching: int) -> None:
        """Raises RequestError 429 where one more whose adapter has to be fetched is too many."""
        num_waiting, limit = len(self._queue) + num_fetching, self._max_num_waiting
        if limit is not None and num_waiting >= FULL_FOR_ALL * limit:
            self._refuse_busy(num_waiting)

    def _refuse_busy(self, num_waiting: int) -> NoReturn:
        raise RequestError(
            f"the engine is busy: {num_waiting} requests wait, and max_num_waiting is "
            f"{self._max_num_waiting}; try again later",
            status=429,
            retry_after=max(1.0, self._seconds_for(self._queue.backlog / 2)),
        )

    def enter(self, request: Request) -> None:
        """The request, which was checked, waits from now on."""
        allowed = self._allowed_seconds(request)
        if allowed is not None:
            deadline = self._clock() + allowed
            heapq.heappush(self._deadlines, (deadline, request.request_id, request))

    def expected_wait(self, request: Request) -> float:
        """Seconds until a new request would be admitted, as things go; 0 if nothing is known.

        Service goes round between tenants and adapters. Before it comes as much as is before it in
        its own queue, of each that waits; and never more than waits in all.
        """
        own = self._queue.backlog_of(request.service_key)
        return self._seconds_for(min(self._queue.backlog, own * self._queue.num_keys))

    def record_step(self) -> None:
        """Once a step: learn from the service that was given since the last."""
        now, total = self._clock(), self._queue.total_service
        if self._last_step is not None:
            then, before = self._last_step
            fading = 0.5 ** ((now - then) / RATE_HALF_LIFE_SECONDS)
            self._service = self._service * fading + total - before
            self._seconds = self._seconds * fading + now - then
        # A time in which nobody waited says nothing of how fast waiting ends.
        self._last_step = (now, total) if len(self._queue) else None

    def take_late(self) -> Iterator[tuple[Request, RequestError]]:
        """Requests that have waited for as long as they may, each once. Those that ran once stay:
        what they got would be lost."""
        now = self._clock()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, request = heapq.heappop(self._deadlines)
            is_new = request.status not in (RequestStatus.RUNNING, RequestStatus.FINISHED)
            if is_new and request.num_preemptions == 0:
                seconds = self._allowed_seconds(request)
                yield (
                    request,
                    RequestError(
                        f"the request was not served within max_queue_seconds={seconds:g}; try "
                        "again later",
                        status=503,
                        retry_after=max(1.0, self.expected_wait(request)),
                    ),
                )

    def _allowed_seconds(self, request: Request) -> float | None:
        own = request.wire.service.max_queue_seconds
        return self._max_queue_seconds if own is None else own

    def _seconds_for(self, service: float) -> float:
        """How long so much service takes, at the rate of late."""
        rate = self._service / self._seconds if self._seconds > 0 else math.inf
        return service / rate if rate > 0 else 0.0
