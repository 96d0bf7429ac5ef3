"""Requests that do not run: their adapters are fetched, their grammars compile, or they wait their
turn. No torch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

from loraplex.engine.adapters.manager import Adapter, AdapterManager
from loraplex.engine.adapters.resolver import AdapterResolver
from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import RequestError
from loraplex.engine.messages import AdapterWait
from loraplex.engine.request import Request, RequestStatus
from loraplex.engine.scheduling.admission import Admission
from loraplex.engine.scheduling.fair_queue import FairQueue
from loraplex.engine.structured_outputs.grammar import CompilingRequests


class WaitingRequests:
    """Their statuses are FETCHING, COMPILING and WAITING; only those of the last are in the fair
    queue, so that nobody waits behind the others."""

    def __init__(
        self, config: EngineConfig, adapters: AdapterManager, resolver: AdapterResolver
    ) -> None:
        self._adapters = adapters
        self._resolver = resolver
        self.queue = FairQueue()
        self._admission = Admission(self.queue, config.max_num_waiting, config.max_queue_seconds)
        self._fetching: set[Request] = set()
        self._compiling = CompilingRequests()
        # Those whose adapters there are not, until the next step.
        self._failed: list[tuple[Request, ValueError]] = []

    def __len__(self) -> int:
        return len(self.queue) + len(self._fetching) + len(self._compiling)

    def __iter__(self) -> Iterator[Request]:
        yield from self._fetching
        yield from self._compiling
        yield from self.queue

    @property
    def num_fetching(self) -> int:
        return len(self._fetching)

    def add(self, request: Request) -> None:
        """Raises RequestError if the request would not be served in time, or not at all."""
        is_known = self._find_adapter(request)
        try:
            if is_known:
                self._admission.check(request)
            else:
                self._admission.check_fetching(len(self._fetching))
        except RequestError:
            if not is_known:
                self._resolver.leave(request)
            raise
        self._admission.enter(request)
        self._enter(request, is_known)

    def _find_adapter(self, request: Request) -> bool:
        """Whether it is known which adapter version the request wants; else it will be told.

        Raises RequestError.
        """
        lora_request = request.wire.lora_request
        if lora_request is None:
            return True
        tell = partial(self._take_answer, request)
        try:
            request.adapter = self._resolver.resolve(lora_request, request, tell)
        except ValueError as error:
            raise RequestError(str(error), getattr(error, "status", 400)) from error
        return request.adapter is not None

    def _enter(self, request: Request, is_known: bool) -> None:
        """It waits for its turn, or first for its adapter to be known or its grammar."""
        request.entered_time = time.monotonic()
        if not is_known:
            request.status = RequestStatus.FETCHING
            self._fetching.add(request)
            return
        if request.grammar is None:
            request.status = RequestStatus.WAITING
            self.queue.enter(request)
        else:
            request.status = RequestStatus.COMPILING
            self.queue.expect(request)
            self._compiling.add(request)
        if request.adapter is not None:
            self._adapters.enter(request.adapter, request.adapter_name)

    def _take_answer(self, request: Request, outcome: Adapter | ValueError) -> None:
        """Queue a request whose adapter is known now; it has failed if there is none for it."""
        self._fetching.remove(request)
        request.adapter_wait = AdapterWait(download=time.monotonic() - request.entered_time)
        try:
            if isinstance(outcome, ValueError):
                raise outcome
            request.adapter = outcome
            self._admission.check(request)
        except ValueError as error:
            if request.adapter is not None:
                request.adapter.files.close()
            else:
                self._adapters.tally[request.adapter_name].failures += 1
            self._failed.append((request, error))
        else:
            self._enter(request, is_known=True)

    def ask_again(self, request: Request) -> None:
        """The version that a request wants, which was removed from the queue and has not run yet,
        is gone: another one will do.

        Raises RequestError, as add does.
        """
        self.leave(request)
        request.adapter = None
        request.block_hashes.clear()
        request.status = RequestStatus.FETCHING
        self._enter(request, self._find_adapter(request))

    def advance(self) -> Iterator[tuple[Request, ValueError]]:
        """Once a step: take in what has come of fetching and compiling. Gives those that failed or
        have waited for too long, which wait no more."""
        self._resolver.deliver()
        yield from self._failed
        self._failed.clear()
        self._admission.record_step()
        for request, late in self._admission.take_late():
            self.remove(request)
            yield request, late
        for request, failure in self._compiling.take_ready():
            if failure is not None:
                yield request, failure
            else:
                self.push_back(request)

    def push_back(self, request: Request) -> None:
        """One that is known to the queue waits there, where its arrival puts it."""
        request.status = RequestStatus.WAITING
        self.queue.push(request)

    def remove(self, request: Request) -> None:
        """It waits no longer."""
        if request.status is RequestStatus.FETCHING:
            self._resolver.leave(request)
            self._fetching.remove(request)
        elif request.status is RequestStatus.COMPILING:
            self._compiling.remove(request)
        else:
            self.queue.remove(request)

    def leave(self, request: Request) -> None:
        """A request that neither waits nor runs any more is of no key and no adapter."""
        if request.status is not RequestStatus.FETCHING:
            self.queue.leave(request)
            if request.adapter is not None:
                self._adapters.leave(request.adapter)

    def check_integrity(self) -> None:
        self._resolver.check_integrity()
        assert all(r.status is RequestStatus.FETCHING for r in self._fetching)
        assert all(r.status is RequestStatus.COMPILING for r in self._compiling)
        assert all(r.status is RequestStatus.WAITING and not r.block_table for r in self.queue)
