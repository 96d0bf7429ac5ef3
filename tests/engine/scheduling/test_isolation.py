"""Requests that make steps fail: they alone are refused, and nobody else loses a token."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
from fake_device import expected_tokens, fake_core, make_request, run_to_end
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.engine.messages import FinishReason
from loraplex.engine.scheduling.isolation import MOST_BLAMED
from loraplex.engine.step import StepBatch, StepResult


class FaultyRunner:
    """Fails where `is_faulty` says so of a step's batch: at its launch, or at its result."""

    def __init__(self, core, is_faulty: Callable[[StepBatch], bool], at_launch: bool) -> None:
        self._core = core
        self._device = core._device
        self._inner = core._device.runner
        self._is_faulty = is_faulty
        self._at_launch = at_launch
        self.num_failures = 0
        core._device.runner = self

    @property
    def in_flight(self):
        return self._inner.in_flight

    def fail(self) -> None:
        self.num_failures += 1
        # Nobody will ask for these results.
        self._inner.compute_all()
        self._inner.in_flight.clear()
        raise RuntimeError("the fake kernel met a token that it can't bear")

    def launch(self, batch: StepBatch) -> FaultyStep:
        is_faulty = self._is_faulty(batch)
        if is_faulty and self._at_launch:
            self.fail()
        return FaultyStep(self, self._inner.launch(batch), is_faulty)


class FaultyStep:
    def __init__(self, runner: FaultyRunner, inner, is_faulty: bool) -> None:
        self._runner, self._inner, self._is_faulty = runner, inner, is_faulty

    def result(self) -> StepResult:
        if self._is_faulty:
            self._runner.fail()
        return self._inner.result()


def holds(names: Iterable[str], min_length: int = 0) -> Callable[[StepBatch], bool]:
    """Whether a batch has one of these requests, when it has that many tokens."""
    wanted = set(names)
    return lambda batch: any(
        r.request_id in wanted and int(length) >= min_length
        for r, length in zip(batch.requests, batch.seq_lens, strict=True)
    )


def check(requests, outputs, culprits: set[str]) -> None:
    for request in requests:
        got = outputs[request.request_id]
        tokens = [t for output in got for t in output.new_token_ids]
        expected = expected_tokens(request)
        if request.request_id in culprits:
            assert got[-1].finish_reason is FinishReason.ERROR
            assert got[-1].error_status == 500
            assert "can't bear" in got[-1].error
            assert tokens == expected[: len(tokens)]
        else:
            assert got[-1].finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
            assert tokens == expected


@pytest.mark.parametrize("at_launch", [False, True])
@pytest.mark.parametrize("steps_ahead", [0, 1])
@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12)), min_size=1, max_size=12),
    culprits=st.sets(st.integers(0, 11), max_size=3),
    min_length=st.integers(0, 24),
    with_adapters=st.booleans(),
)
def test_the_others_get_all_their_tokens(
    steps_ahead, at_launch, lengths, culprits, min_length, with_adapters
):
    core = fake_core(64, steps_ahead=steps_ahead, max_num_batched_tokens=16)
    requests = [
        make_request(
            f"r{i}",
            range(i, i + num_prompt_tokens),
            max_tokens,
            adapter=f"a{i % 3}" if with_adapters and i % 4 else None,
        )
        for i, (num_prompt_tokens, max_tokens) in enumerate(lengths)
    ]
    # Whoever ends before it is that long does no harm.
    faulty = {
        f"r{i}" for i in culprits
        if i < len(lengths)
        and lengths[i][0] + len(expected_tokens(requests[i])) - 1 >= min_length
    }  # fmt: skip
    FaultyRunner(core, holds(faulty, min_length), at_launch)
    for request in requests:
        core.add_request(request)
    outputs = run_to_end(core)
    check(requests, outputs, faulty)
    assert core.stats()["requests_isolated"] == len(faulty)
    stats = core.stats()
    assert stats["pages_kv"] == stats["pages_adapter"] == 0


def test_a_culprit_of_many_is_found_in_few_steps():
    core = fake_core(600, max_num_seqs=64, max_num_batched_tokens=512)
    requests = [make_request(f"r{i}", range(i, i + 5), 8) for i in range(64)]
    runner = FaultyRunner(core, holds({"r37"}, 9), at_launch=False)
    for request in requests:
        core.add_request(request)
    check(requests, run_to_end(core), {"r37"})
    assert runner.num_failures <= 12


def test_a_request_that_comes_meanwhile_is_served():
    core = fake_core(64)
    requests = [make_request(f"r{i}", range(i, i + 5), 4) for i in range(4)]
    FaultyRunner(core, holds({"r0"}), at_launch=False)
    for request in requests[:3]:
        core.add_request(request)
    outputs = {output.request_id: [output] for output in core.step()}
    core.add_request(requests[3])
    for name, more in run_to_end(core).items():
        outputs.setdefault(name, []).extend(more)
    check(requests, outputs, {"r0"})


def test_suspects_that_are_aborted_leave_nothing_waiting():
    core = fake_core(64)
    requests = [make_request(f"r{i}", range(i, i + 5), 4) for i in range(5)]
    FaultyRunner(core, holds({"r0"}), at_launch=False)
    for request in requests:
        core.add_request(request)
    core.step()
    core.abort_requests(["r0", "r1"])
    outputs = run_to_end(core)
    assert outputs["r0"][-1].finish_reason is FinishReason.ABORT
    check(requests[2:], outputs, set())


def test_a_device_that_always_fails_is_not_blamed_on_all_requests():
    core = fake_core(64)
    FaultyRunner(core, lambda batch: True, at_launch=False)
    for i in range(6):
        core.add_request(make_request(f"r{i}", range(5), 4))
    with pytest.raises(RuntimeError, match="can't bear"):
        run_to_end(core)
    assert core.stats()["requests_isolated"] == MOST_BLAMED
