"""Serves conversations on a simulated device: asks what is due, steps, and moves the clock."""

from __future__ import annotations

import math
from collections.abc import Sequence
from heapq import heapify, heappop, heappush

from loraplex.benchmarks.conversations import Conversation
from loraplex.benchmarks.simulated_device import SimulatedDevice
from loraplex.engine.core import EngineCore
from loraplex.engine.lora_request import LoRARequest
from loraplex.engine.messages import EngineOutput, EngineRequest
from loraplex.engine.sampling_params import SamplingParams

COUNTERS = ("adapter_loads", "prefix_hit_tokens", "prompt_tokens", "output_tokens", "preemptions")


class Replay:
    """Conversations on their way."""

    def __init__(
        self, core: EngineCore, device: SimulatedDevice, conversations: Sequence[Conversation]
    ) -> None:
        """device: the core's."""
        self._core, self._device = core, device
        self._conversations = conversations
        # All tokens of each so far: what the next turn's prompt begins with.
        self._tokens = [conversation.opening for conversation in conversations]
        # When, conversation and turn, of the turns whose time is known.
        self._due = [(c.start, index, 0) for index, c in enumerate(conversations)]
        heapify(self._due)
        self._due_times: dict[str, float] = {}
        self._num_served = 0
        self.ttfts: list[float] = []
        """Of requests in the order of their first tokens, from when they were due. Seconds."""

    def run_until(self, end: float) -> None:
        """Until this time, or until nothing is left to do. RuntimeError if a request fails."""
        device, store = self._device, self._device.adapter_store
        while device.now < end:
            while self._due and self._due[0][0] <= device.now:
                self._ask(*heappop(self._due))
            before = device.now, device.num_steps
            for output in self._core.step():
                self._take(output)
            if before != (device.now, device.num_steps):
                continue
            # Nothing to do until the next turn, or until an adapter is there.
            next_due = self._due[0][0] if self._due else math.inf
            next_copied = store.copied_at if store.copied_at > device.now else math.inf
            device.now = min(next_due, next_copied, end)

    def counters(self) -> dict[str, float]:
        """The engine's COUNTERS, seconds, and requests that have had their first token."""
        stats = self._core.stats()
        return {name: stats[name] for name in COUNTERS} | {
            "seconds": self._device.now,
            "requests": self._num_served,
        }

    def _ask(self, due: float, index: int, turn_index: int) -> None:
        conversation = self._conversations[index]
        turn = conversation.turns[turn_index]
        prompt = self._tokens[index] = self._tokens[index] + turn.token_ids
        request_id = f"{index}/{turn_index}"
        self._due_times[request_id] = due
        adapter = str(conversation.adapter)
        self._core.add_request(
            EngineRequest(
                request_id=request_id,
                prompt_token_ids=list(prompt),  # `prompt` gets the answer, too.
                sampling_params=SamplingParams(
                    temperature=0, max_tokens=turn.max_tokens, ignore_eos=True
                ),
                max_tokens=turn.max_tokens,
                eos_token_ids=[],
                seed=0,
                lora_request=LoRARequest(adapter, adapter),
            )
        )

    def _take(self, output: EngineOutput) -> None:
        if output.error is not None:
            raise RuntimeError(f"request {output.request_id} failed: {output.error}")
        due = self._due_times.pop(output.request_id, None)
        if due is not None:
            self._num_served += 1
            self.ttfts.append(self._device.now - due)
        index, turn_index = map(int, output.request_id.split("/"))
        self._tokens[index].extend(output.new_token_ids)
        turns = self._conversations[index].turns
        if output.finish_reason is not None and turn_index + 1 < len(turns):
            due = self._device.now + turns[turn_index + 1].pause
            heappush(self._due, (due, index, turn_index + 1))
