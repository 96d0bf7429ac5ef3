"""Workloads: the same every time, and distributed as they say."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from loraplex.benchmarks.workloads import chat, m1, num_distinct_adapters, slora


def test_m1_is_what_was_measured_of_others():
    requests = m1(8)
    assert requests == m1(8)
    assert len(requests) == 512
    assert {len(r.prompt_token_ids) for r in requests} == {256}
    assert {(r.max_tokens, r.arrival_time) for r in requests} == {(128, 0.0)}
    shares = Counter(r.adapter for r in requests)
    assert set(shares) == set(range(8))
    assert 40 <= min(shares.values()) <= max(shares.values()) <= 90
    tokens = np.array([r.prompt_token_ids for r in requests])
    assert tokens.min() >= 0
    assert 128_000 < tokens.max() < 128_256
    assert len({r[0] for r in tokens.tolist()}) > 500, "prompts that begin alike"


def test_m1_without_adapters_and_with_many():
    assert {r.adapter for r in m1(0)} == {None}
    assert num_distinct_adapters(m1(0)) == 0
    # Of 1000 * (1 - 0.999 ** 512) = 401 that are expected.
    assert 375 <= num_distinct_adapters(m1(1000)) <= 425


def test_slora_draws_in_the_published_order():
    requests = slora(100, alpha=0.3, rate=10, cv=2, duration=60)
    rng = np.random.RandomState(42)
    adapters = (rng.power(0.3, 600) * 100).astype(int)
    input_lens, output_lens = rng.randint(8, 512, 600), rng.randint(8, 512, 600)
    arrivals = np.cumsum(rng.gamma(1 / 4, 4 / 10, 600))
    assert [r.adapter for r in requests] == adapters.tolist()
    assert [len(r.prompt_token_ids) for r in requests] == input_lens.tolist()
    assert [r.max_tokens for r in requests] == output_lens.tolist()
    assert [r.arrival_time for r in requests] == pytest.approx(arrivals.tolist())


def test_slora_is_distributed_as_asked():
    requests = slora(
        200, alpha=0.1, rate=50, cv=4, duration=400, input_range=(4, 6), output_range=(1, 2)
    )
    assert {len(r.prompt_token_ids) for r in requests} == {4, 5}
    assert {r.max_tokens for r in requests} == {1}
    popular = sum(r.adapter < 20 for r in requests) / len(requests)
    assert popular == pytest.approx(0.1**0.1, abs=0.02)
    gaps = np.diff([0.0, *(r.arrival_time for r in requests)])
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.1)
    assert gaps.std() / gaps.mean() == pytest.approx(4, rel=0.15)


def test_slora_without_adapters_is_otherwise_the_same():
    with_adapters, without = slora(5, duration=20), slora(0, duration=20)
    assert {r.adapter for r in without} == {None}
    for name in ("arrival_time", "max_tokens", "prompt_token_ids"):
        assert [getattr(r, name) for r in with_adapters] == [getattr(r, name) for r in without]
    assert slora(5, duration=20, seed=1) != with_adapters


def test_conversations_begin_as_they_went_on():
    requests = chat(3, rate=2, duration=10, num_turns=3, system_len=16, think_time=1.0)
    assert requests == chat(3, rate=2, duration=10, num_turns=3, system_len=16, think_time=1.0)
    assert len(requests) == 2 * 10 * 3
    assert all(a.arrival_time <= b.arrival_time for a, b in pairwise(requests))
    beginnings = {(r.adapter, tuple(r.prompt_token_ids[:16])) for r in requests}
    assert len(beginnings) == num_distinct_adapters(requests), "one system prompt an adapter"

    def follows(turn, other):
        length = len(turn.prompt_token_ids)
        return (
            other.arrival_time > turn.arrival_time
            and other.adapter == turn.adapter
            and len(other.prompt_token_ids) > length + turn.max_tokens
            and other.prompt_token_ids[:length] == turn.prompt_token_ids
        )

    successors = Counter(sum(follows(a, b) for b in requests) for a in requests)
    assert successors == {2: 20, 1: 20, 0: 20}
