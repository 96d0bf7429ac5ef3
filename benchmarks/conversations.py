"""Traffic of several turns, whose next prompts depend on the answers: what a cache lives on.

Seeded; no engine, no torch. A workload without a second turn or a shared opening is one, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

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


@dataclass(frozen=True, slots=True)
class Traffic:
    """How much of a workload there is."""

    rate: float
    """Of conversations that start, a second."""
    duration: float
    """Seconds in which they do."""
    seed: int
    scale: float = 1.0
    """Of the numbers of adapters and the pauses. A pool of a tenth of the pages sees the same with
    0.1: as large a part of the adapters fits in it, and as large a part of it has changed hands
    when a conversation goes on."""
    vocab_size: int = LLAMA_3_VOCAB_SIZE


class _Maker:
    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic
        self.rng = np.random.default_rng(traffic.seed)
        # A Poisson process.
        rate, count = traffic.rate, int(traffic.rate * traffic.duration)
        self.starts = np.cumsum(self.rng.exponential(1 / rate, count)).tolist()

    def num_adapters(self, full: int) -> int:
        """full: at a scale of 1."""
        return max(1, round(full * self.traffic.scale))

    def pauses(self, mean: float, count: int) -> list[float]:
        return self.rng.exponential(mean * self.traffic.scale, count).tolist()

    def tokens(self, length: int) -> list[int]:
        return self.rng.integers(self.traffic.vocab_size, size=length).tolist()

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


def uniform(traffic: Traffic) -> list[Conversation]:
    """Single questions that share nothing, each of any of 1500 adapters."""
    make = _Maker(traffic)
    adapters = make.rng.integers(make.num_adapters(1500), size=len(make.starts))
    return make.questions(adapters.tolist(), [])


def skewed(traffic: Traffic) -> list[Conversation]:
    """Single questions of 1500 adapters, most of them of few; half of the adapters have a system
    prompt."""
    make = _Maker(traffic)
    num_adapters = make.num_adapters(1500)
    openings = make.openings(num_adapters, 0.5)
    return make.questions(make.zipf(num_adapters), openings)


def chat(traffic: Traffic) -> list[Conversation]:
    """Conversations of five turns on average with 200 adapters, with system prompts and 20 seconds
    between turns."""
    make = _Maker(traffic)
    num_adapters = make.num_adapters(200)
    openings = make.openings(num_adapters, 1.0)
    conversations = []
    for start, adapter in zip(make.starts, make.zipf(num_adapters), strict=True):
        num_turns = min(int(make.rng.geometric(1 / 5)), 15)
        pauses = [0.0, *make.pauses(20.0, num_turns - 1)]
        turns = [make.turn((16, 256), (32, 384), pause) for pause in pauses]
        conversations.append(Conversation(start, adapter, openings[adapter], turns))
    return conversations


def scan(traffic: Traffic) -> list[Conversation]:
    """Every second question is of an adapter that comes once and never again; the others are of 200
    adapters with system prompts, most of them of few."""
    make = _Maker(traffic)
    num_adapters = make.num_adapters(200)
    openings = make.openings(num_adapters, 1.0)
    once = make.rng.random(len(make.starts)) < 0.5
    adapters = [
        num_adapters + i if once[i] else adapter
        for i, adapter in enumerate(make.zipf(num_adapters))
    ]
    return make.questions(adapters, openings)


def bursts(traffic: Traffic) -> list[Conversation]:
    """Documents of 512 to 4095 tokens, each asked about eight times on average within some seconds,
    and never again: what was used last is wanted next, and what was used most is done with. Of 200
    adapters."""
    make = _Maker(replace(traffic, rate=traffic.rate / 8))
    conversations = []
    for start, adapter in zip(make.starts, make.zipf(make.num_adapters(200)), strict=True):
        document = make.tokens(int(make.rng.integers(512, 4096)))
        gaps = make.pauses(2.0, int(make.rng.geometric(1 / 8)) - 1)
        conversations += [
            Conversation(start + asked, adapter, document, [make.turn((16, 64), (16, 128))])
            for asked in np.cumsum([0.0, *gaps]).tolist()
        ]
    return conversations


def fit_in(conversations: Iterable[Conversation], max_model_len: int) -> list[Conversation]:
    """Without the turns that end beyond so many tokens, and those after them."""
    fitting = []
    for conversation in conversations:
        sizes = [len(turn.token_ids) + turn.max_tokens for turn in conversation.turns]
        ends = np.cumsum(sizes) + len(conversation.opening)
        if num_turns := int((ends <= max_model_len).sum()):
            fitting.append(replace(conversation, turns=conversation.turns[:num_turns]))
    return fitting


WORKLOADS: dict[str, Callable[[Traffic], list[Conversation]]] = {
    "uniform": uniform,
    "zipf": skewed,
    "chat": chat,
    "scan": scan,
    "bursts": bursts,
}
