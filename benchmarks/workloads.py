"""Requests to measure with: what is asked, of which adapter, and when. Seeded; no engine, no torch.

Prompts are random token ids, so that no two share a beginning unless the workload says so.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

LLAMA_3_VOCAB_SIZE = 128_256


@dataclass(frozen=True, slots=True)
class WorkloadRequest:
    """One request; `adapter` is an index, or None for the base model."""

    prompt_token_ids: list[int]
    max_tokens: int
    adapter: int | None
    arrival_time: float = 0.0
    """Seconds after the start."""


def m1(
    num_adapters: int,
    num_requests: int = 512,
    input_len: int = 256,
    output_len: int = 128,
    vocab_size: int = LLAMA_3_VOCAB_SIZE,
) -> list[WorkloadRequest]:
    """M1, "mixed offline": all at once, equal lengths, each adapter uniformly out of all."""
    rng = random.Random(0)
    requests = []
    for _ in range(num_requests):
        prompt = [rng.randrange(vocab_size) for _ in range(input_len)]
        adapter = rng.randrange(num_adapters) if num_adapters else None
        requests.append(WorkloadRequest(prompt, output_len, adapter))
    return requests


def slora(
    num_adapters: int,
    alpha: float = 1.0,
    rate: float = 2.0,
    cv: float = 1.0,
    duration: float = 300.0,
    input_range: tuple[int, int] = (8, 512),
    output_range: tuple[int, int] = (8, 512),
    seed: int = 42,
    vocab_size: int = LLAMA_3_VOCAB_SIZE,
) -> list[WorkloadRequest]:
    """S-LoRA's synthetic traffic, number for number; int(rate * duration) requests.

    alpha: exponent of the power law of adapters: 1 is uniform, 0.1 gives most to the first ones.
    rate: requests per second. cv: coefficient of variation of the gaps between arrivals, which are
    gamma distributed: 1 is a Poisson process, more is burstier. Ranges leave out their upper ends.

    The prompts' tokens are ours and come from another generator: S-LoRA repeats one word, which a
    prefix cache would make free.
    """
    count = int(rate * duration)
    # The legacy generator, because its numbers are what the published runs had.
    rng = np.random.RandomState(seed)
    adapters = _popular_adapters(rng, num_adapters, alpha, count)
    input_lens = rng.randint(*input_range, size=count)
    output_lens = rng.randint(*output_range, size=count)
    arrivals = np.cumsum(rng.gamma(1 / cv**2, cv**2 / rate, count))
    tokens = _token_source(seed, vocab_size)
    return [
        WorkloadRequest(tokens(int(i)), int(o), adapter, float(t))
        for i, o, adapter, t in zip(input_lens, output_lens, adapters, arrivals, strict=True)
    ]


def chat(
    num_adapters: int,
    alpha: float = 0.3,
    rate: float = 0.5,
    cv: float = 1.0,
    duration: float = 300.0,
    num_turns: int = 4,
    think_time: float = 10.0,
    system_len: int = 256,
    input_range: tuple[int, int] = (16, 128),
    output_range: tuple[int, int] = (32, 256),
    seed: int = 42,
    vocab_size: int = LLAMA_3_VOCAB_SIZE,
) -> list[WorkloadRequest]:
    """Conversations of several turns, by time of arrival; int(rate * duration) of them.

    A turn's prompt begins with the whole prompt before it, and all conversations of an adapter
    begin with its system prompt: what a prefix cache lives on. The replies in it are random tokens
    and not those that the model will have given, which are not known when the workload is made.
    rate: conversations per second. think_time: mean seconds from a turn to the next, exponentially
    distributed and counted from the arrival, because arrivals don't wait for answers. alpha, cv and
    ranges (of a turn) are as in slora.
    """
    count = int(rate * duration)
    rng = np.random.RandomState(seed)
    adapters = _popular_adapters(rng, num_adapters, alpha, count)
    starts = np.cumsum(rng.gamma(1 / cv**2, cv**2 / rate, count))
    tokens = _token_source(seed, vocab_size)
    system_prompts = [tokens(system_len) for _ in range(num_adapters or 1)]

    def conversation(adapter: int | None, start: float) -> Iterator[WorkloadRequest]:
        history, now = system_prompts[adapter or 0], start
        for _ in range(num_turns):
            prompt = history + tokens(rng.randint(*input_range))
            output_len = rng.randint(*output_range)
            yield WorkloadRequest(prompt, output_len, adapter, now)
            history = prompt + tokens(output_len)
            now += rng.exponential(think_time)

    turns = [
        turn
        for adapter, start in zip(adapters, starts, strict=True)
        for turn in conversation(adapter, float(start))
    ]
    return sorted(turns, key=lambda turn: turn.arrival_time)


def num_distinct_adapters(requests: Sequence[WorkloadRequest]) -> int:
    return len({request.adapter for request in requests} - {None})


def _popular_adapters(
    rng: np.random.RandomState, num_adapters: int, alpha: float, count: int
) -> list[int | None]:
    # Drawn without adapters, too, so that the same seed has the same lengths and arrivals.
    drawn = rng.power(alpha, count)
    if not num_adapters:
        return [None] * count
    # Rounding may give the end of the range itself.
    return np.minimum(drawn * num_adapters, num_adapters - 1).astype(int).tolist()


def _token_source(seed: int, vocab_size: int) -> Callable[[int], list[int]]:
    rng = np.random.default_rng(seed)
    return lambda length: rng.integers(vocab_size, size=length).tolist()
