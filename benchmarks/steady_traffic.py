"""Requests that run all the time, a few at once, and whose tokens are known."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loraplex.benchmarks import core_steps
from loraplex.engine.core import EngineCore
from loraplex.engine.lora_request import LoRARequest
from loraplex.engine.messages import EngineOutput, EngineRequest

INPUT_LEN = 32
OUTPUT_LEN = 24
NUM_PROMPTS = 2
EMPTY_STEP_SECONDS = 0.01


@dataclass
class Reply:
    """What a request has got so far. Seconds from when it was added."""

    began: float
    tokens: list[int] = field(default_factory=list)
    last_time: float | None = None
    """When its last tokens came."""
    seconds: float | None = None
    """To its end; None while it runs."""
    error: str | None = None
    status: int | None = None


class SteadyTraffic:
    """Drives a core, with so many requests beside those that are asked of it."""

    def __init__(self, core: EngineCore, adapters: Sequence[Path], num_running: int) -> None:
        """adapters: what the requests go round, with the base model. Nothing runs yet."""
        self._core = core
        self._num_running = num_running
        prompts = core_steps.Prompts(core.model_info.vocab_size)
        self._cases = [
            (prompts.draw(INPUT_LEN), adapter)
            for _ in range(NUM_PROMPTS)
            for adapter in (None, *adapters)
        ]
        self._numbers = itertools.count()
        self._running: dict[str, Reply] = {}
        self._case_of: dict[str, int] = {}
        self.gaps: list[float] = []
        """Between tokens of the steady requests, in seconds; to be cleared by whoever reads it."""
        self.num_finished = self.num_wrong = 0
        # What each gets alone, before anything goes wrong.
        self._expected = [
            self.send([core_steps.make_request(f"alone {i}", prompt, OUTPUT_LEN, adapter)])[
                0
            ].tokens
            for i, (prompt, adapter) in enumerate(self._cases)
        ]

    def run(self, requests: Sequence[EngineRequest] = (), seconds: float = 0.0) -> list[Reply]:
        """The replies to these, which run beside the steady ones, for so many seconds at least."""
        end = time.perf_counter() + seconds
        return self.send(requests, end)

    def send(self, requests: Sequence[EngineRequest], end: float | None = None) -> list[Reply]:
        """The replies to these. end: the steady requests run beside them, and until then, too."""
        replies = {}
        for request in requests:
            replies[request.request_id] = Reply(time.perf_counter())
            self._core.add_request(request)
        while any(reply.seconds is None for reply in replies.values()) or (
            end is not None and time.perf_counter() < end
        ):
            if end is not None:
                self._top_up()
            self._step(replies)
        return list(replies.values())

    def drain(self) -> None:
        """Let the steady requests end."""
        while self._core.has_unfinished_requests():
            self._step({})

    def _top_up(self) -> None:
        while len(self._running) < self._num_running:
            number = next(self._numbers)
            prompt, adapter = self._cases[number % len(self._cases)]
            request_id = f"steady {number}"
            self._running[request_id] = Reply(time.perf_counter())
            self._case_of[request_id] = number % len(self._cases)
            self._core.add_request(core_steps.make_request(request_id, prompt, OUTPUT_LEN, adapter))

    def _step(self, replies: dict[str, Reply]) -> None:
        outputs = self._core.step()
        now = time.perf_counter()
        for output in outputs:
            reply = self._running.get(output.request_id)
            if reply is None:
                _take(replies[output.request_id], output, now)
                continue
            if reply.last_time is not None and output.new_token_ids:
                self.gaps.append(now - reply.last_time)
            _take(reply, output, now)
            if reply.seconds is not None:
                del self._running[output.request_id]
                expected = self._expected[self._case_of.pop(output.request_id)]
                self.num_finished += 1
                self.num_wrong += reply.tokens != expected
        if not outputs:
            self._core.wait_for_work(EMPTY_STEP_SECONDS)


def probe(request_id: str, prompt: list[int], lora: LoRARequest, max_tokens: int) -> EngineRequest:
    """A request for an adapter, by whatever reference."""
    request = core_steps.make_request(request_id, prompt, max_tokens)
    request.lora_request = lora
    return request


def _take(reply: Reply, output: EngineOutput, now: float) -> None:
    reply.tokens += output.new_token_ids
    reply.last_time = now
    if output.finish_reason is not None:
        reply.seconds = now - reply.began
        reply.error = output.error
        reply.status = None if output.error is None else output.error_status
