"""Serves conversations: asks what is due, and steps. Does not know whether time is simulated."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush
from typing import Protocol

from loraplex.benchmarks.conversations import Conversation
from loraplex.benchmarks.core_steps import WAIT_SECONDS, make_request
from loraplex.engine.core import EngineCore
from loraplex.engine.messages import EngineOutput

COUNTERS = ("adapter_loads", "prefix_hit_tokens", "prompt_tokens", "output_tokens", "preemptions")


class Clock(Protocol):
    """The time that the core's steps take."""

    @property
    def now(self) -> float:
        """Seconds since the start."""

    def wait(self, until: float) -> None:
        """The last step gave nothing: until this time, unless there is something to do before."""


class WallClock:
    """Real time."""

    def __init__(self, core: EngineCore) -> None:
        """It starts now."""
        self._core = core
        self._began = time.perf_counter()

    @property
    def now(self) -> float:
        return time.perf_counter() - self._began

    def wait(self, until: float) -> None:
        self._core.wait_for_work(max(0.0, min(until - self.now, WAIT_SECONDS)))


class Replay:
    """Conversations on their way."""

    def __init__(
        self,
        core: EngineCore,
        clock: Clock,
        conversations: Sequence[Conversation],
        adapter_path: Callable[[int], str] = str,
    ) -> None:
        """clock: the core's. adapter_path: of the adapter of this number."""
        self._core, self._clock = core, clock
        self._adapter_path = adapter_path
        self._conversations = conversations
        # All tokens of each so far: what the next turn's prompt begins with.
        self._tokens = [conversation.opening for conversation in conversations]
        # When, conversation and turn, of the turns whose time is known.
        self._due = [(c.start, index, 0) for index, c in enumerate(conversations)]
        heapify(self._due)
        self._due_times: dict[str, float] = {}
        self._unfinished: set[str] = set()
        self._num_served = 0
        self.ttfts: list[float] = []
        """Of requests in the order of their first tokens, from when they were due. Seconds."""

    def run_until(self, end: float) -> None:
        """Until this time, or until nothing is left to do. RuntimeError if a request fails."""
        while (now := self._clock.now) < end:
            while self._due and self._due[0][0] <= now:
                self._ask(*heappop(self._due))
            outputs = self._core.step()
            for output in outputs:
                self._take(output)
            if not outputs:
                next_due = self._due[0][0] if self._due else math.inf
                self._clock.wait(min(next_due, end))

    def end(self) -> None:
        """Abort what runs, and step until nothing is under way to the pool any more."""
        self._core.abort_requests(list(self._unfinished))
        while self._core.has_unfinished_requests() or self._core.stats()["pages_adapter"]:
            self._core.step()

    def counters(self) -> dict[str, float]:
        """The engine's COUNTERS, seconds, and requests that have had their first token."""
        stats = self._core.stats()
        return {name: stats[name] for name in COUNTERS} | {
            "seconds": self._clock.now,
            "requests": self._num_served,
        }

    def _ask(self, due: float, index: int, turn_index: int) -> None:
        conversation = self._conversations[index]
        turn = conversation.turns[turn_index]
        prompt = self._tokens[index] = self._tokens[index] + turn.token_ids
        request_id = f"{index}/{turn_index}"
        self._due_times[request_id] = due
        self._unfinished.add(request_id)
        # A copy, since `prompt` gets the answer, too.
        adapter = self._adapter_path(conversation.adapter)
        self._core.add_request(make_request(request_id, list(prompt), turn.max_tokens, adapter))

    def _take(self, output: EngineOutput) -> None:
        if output.error is not None:
            raise RuntimeError(f"request {output.request_id} failed: {output.error}")
        due = self._due_times.pop(output.request_id, None)
        if due is not None:
            self._num_served += 1
            self.ttfts.append(self._clock.now - due)
        index, turn_index = map(int, output.request_id.split("/"))
        self._tokens[index].extend(output.new_token_ids)
        turns = self._conversations[index].turns
        if output.finish_reason is None:
            return
        self._unfinished.remove(output.request_id)
        if turn_index + 1 < len(turns):
            due = self._clock.now + turns[turn_index + 1].pause
            heappush(self._due, (due, index, turn_index + 1))
