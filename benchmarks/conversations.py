"""Traffic of several turns, whose next prompts depend on the answers: what a cache lives on.

Seeded; no engine, no torch. A workload without a second turn or a shared opening is one, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from loraplex.benchmarks.workloads import LLAMA_3_VOCAB_SIZE

LONG = (8, 512)
"""S-LoRA's range of prompts and of answers, in tokens; the upper end is left out."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What a user says, after the answer to the turn before."""

    token_ids: list[int]
    max_tokens: int
    pause: float
    """Seconds from the last answer's end, or from the conversation's start."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Each turn's prompt is the opening, all turns and answers so far, and the turn."""

    start: float
    adapter: int
    opening: list[int]
    """A system prompt or a document, which other conversations of the adapter share."""
    turns: list[Turn]


class _Maker:
    def __init__(self, rate: float, duration: float, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        # A Poisson process.
        self.starts = np.cumsum(self.rng.exponential(1 / rate, int(rate * duration))).tolist()

    def tokens(self, length: int) -> list[int]:
        return self.rng.integers(LLAMA_3_VOCAB_SIZE, size=length).tolist()

    def openings(self, count: int, share: float) -> list[list[int]]:
        """System prompts of 512 to 2047 tokens for so many adapters; only a share has one."""
        return [
            self.tokens(int(self.rng.integers(512, 2048))) if self.rng.random() < share else []
            for _ in range(count)
        ]

    def zipf(self, num_adapters: int) -> list[int]:
        """An adapter for each start: the k-th most popular with a weight of 1/k."""
        weights = 1 / np.arange(1, num_adapters + 1)
        return self.rng.choice(num_adapters, len(self.starts), p=weights / weights.sum()).tolist()

    def turn(
        self, input_range: tuple[int, int], output_range: tuple[int, int], pause: float = 0.0
    ) -> Turn:
        tokens = self.tokens(int(self.rng.integers(*input_range)))
        return Turn(tokens, int(self.rng.integers(*output_range)), pause)

    def questions(
        self, adapters: Sequence[int], openings: Sequence[list[int]]
    ) -> list[Conversation]:
        """Single turns; adapters beyond the openings have none."""
        return [
            Conversation(
                start, adapter, openings[adapter] if adapter < len(openings) else [],
                [self.turn(LONG, LONG)],
            )
            for start, adapter in zip(self.starts, adapters, strict=True)
        ]  # fmt: skip


def uniform(
    rate: float, duration: float, seed: int, num_adapters: int = 1500
) -> list[Conversation]:
    """Single questions that share nothing, each of any adapter."""
    make = _Maker(rate, duration, seed)
    return make.questions(make.rng.integers(num_adapters, size=len(make.starts)).tolist(), [])


def skewed(rate: float, duration: float, seed: int, num_adapters: int = 1500) -> list[Conversation]:
    """Single questions, most of them of few adapters; half of the adapters have a system prompt."""
    make = _Maker(rate, duration, seed)
    openings = make.openings(num_adapters, 0.5)
    return make.questions(make.zipf(num_adapters), openings)


def chat(rate: float, duration: float, seed: int, num_adapters: int = 200) -> list[Conversation]:
    """Conversations of five turns on average, with system prompts and 20 seconds between turns."""
    make = _Maker(rate, duration, seed)
    openings = make.openings(num_adapters, 1.0)
    conversations = []
    for start, adapter in zip(make.starts, make.zipf(num_adapters), strict=True):
        num_turns = min(int(make.rng.geometric(1 / 5)), 15)
        pauses = [0.0, *make.rng.exponential(20.0, num_turns - 1).tolist()]
        turns = [make.turn((16, 256), (32, 384), pause) for pause in pauses]
        conversations.append(Conversation(start, adapter, openings[adapter], turns))
    return conversations


def scan(rate: float, duration: float, seed: int, num_adapters: int = 200) -> list[Conversation]:
    """Every second question is of an adapter that comes once and never again; the others are of
    adapters with system prompts, most of them of few."""
    make = _Maker(rate, duration, seed)
    openings = make.openings(num_adapters, 1.0)
    once = make.rng.random(len(make.starts)) < 0.5
    adapters = [
        num_adapters + i if once[i] else adapter
        for i, adapter in enumerate(make.zipf(num_adapters))
    ]
    return make.questions(adapters, openings)


def bursts(rate: float, duration: float, seed: int, num_adapters: int = 200) -> list[Conversation]:
    """Documents of 512 to 4095 tokens, each asked about eight times on average within some seconds,
    and never again: what was used last is wanted next, and what was used most is done with."""
    make = _Maker(rate / 8, duration, seed)
    conversations = []
    for start, adapter in zip(make.starts, make.zipf(num_adapters), strict=True):
        document = make.tokens(int(make.rng.integers(512, 4096)))
        gaps = make.rng.exponential(2.0, int(make.rng.geometric(1 / 8)) - 1).tolist()
        conversations += [
            Conversation(start + asked, adapter, document, [make.turn((16, 64), (16, 128))])
            for asked in np.cumsum([0.0, *gaps]).tolist()
        ]
    return conversations


WORKLOADS: dict[str, Callable[[float, float, int], list[Conversation]]] = {
    "uniform": uniform,
    "zipf": skewed,
    "chat": chat,
    "scan": scan,
    "bursts": bursts,
}
