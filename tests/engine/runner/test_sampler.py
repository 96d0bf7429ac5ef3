"""The sampler against a slow one that follows the definitions, feature by feature."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sampling_rows import sample as sample_natively
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from loraplex.engine.messages import EngineRequest
from loraplex.engine.runner import logits as logits_module
from loraplex.engine.runner import sampler
from loraplex.engine.runner.adjusted_logits import adjust, adjust_part
from loraplex.engine.runner.logprobs import prompt_logprobs
from loraplex.engine.runner.sampling_state import SamplingState, generator_state, uniform
from loraplex.engine.sampling_params import SamplingParams

pytestmark = pytest.mark.usefixtures("one_thread")

EOS = 2


class Requests:
    """Running requests, row by row: their sampling parameters, prompts and outputs."""

    def __init__(self, params, prompts=None, outputs=None, seeds=None):
        num = len(params)
        self.params = params
        self.prompts = prompts or [[1]] * num
        self.outputs = outputs or [[]] * num
        self.seeds = seeds or list(range(num))

    def batch(self, rows=None, vocab_size=64):
        """Rows sit in slots in reverse, among empty ones."""
        num_slots = 2 * len(self.params)
        state = SamplingState(num_slots, vocab_size)
        token_ids = np.full((num_slots, 64), 7, np.int32)
        num_prompt = np.zeros(num_slots, np.int32)
        num_tokens = np.zeros(num_slots, np.int32)
        slots = np.arange(num_slots - 1, 0, -2)
        for row, slot in enumerate(slots):
            tokens = self.prompts[row] + self.outputs[row]
            token_ids[slot, : len(tokens)] = tokens
            num_prompt[slot], num_tokens[slot] = len(self.prompts[row]), len(tokens)
            state.add(
                int(slot),
                EngineRequest(
                    request_id=str(row),
                    prompt_token_ids=self.prompts[row],
                    sampling_params=self.params[row],
                    max_tokens=99,
                    eos_token_ids=[EOS],
                    seed=self.seeds[row],
                    bad_words_token_ids=bad_words_token_ids(self.params[row]),
                ),
            )
        slots = slots if rows is None else slots[rows]
        return state.gather(
            slots, (num_tokens - num_prompt)[slots], token_ids, num_prompt, num_tokens
        )

    def sample(self, logits, rows=None):
        logits = logits if rows is None else logits[rows]
        before = logits.clone()
        output = sampler.sample(logits, self.batch(rows, logits.shape[1]))
        assert torch.equal(logits, before), "the logits are the caller's"
        return output

    def by_definition(self, logits) -> list[int]:
        return [
            choose_by_definition(
                logits[row].double().numpy().copy(),
                self.params[row],
                self.prompts[row],
                self.outputs[row],
                self.seeds[row],
            )
            for row in range(len(self.params))
        ]


def bad_words_token_ids(params) -> list[list[int]]:
    """In these tests words are the numbers of their tokens."""
    return [list(map(int, word.split())) for word in params.bad_words]


def adjust_by_definition(logits, params, prompt, output):
    for token_id, bias in params.logit_bias.items():
        logits[token_id] += bias
    for *beginning, last in bad_words_token_ids(params):
        if output[len(output) - len(beginning) :] == beginning:
            logits[last] = -np.inf
    if len(output) < params.min_tokens:
        for token_id in [*params.stop_token_ids, *([] if params.ignore_eos else [EOS])]:
            logits[token_id] = -np.inf
    for token_id in set(prompt + output):
        if logits[token_id] > 0:
            logits[token_id] /= params.repetition_penalty
        else:
            logits[token_id] *= params.repetition_penalty
    for token_id in set(output):
        logits[token_id] -= params.presence_penalty
        logits[token_id] -= params.frequency_penalty * output.count(token_id)
    if params.allowed_token_ids is not None:
        forbidden = np.delete(np.arange(len(logits)), params.allowed_token_ids)
        logits[forbidden] = -np.inf
    return logits


def choose_by_definition(logits, params, prompt, output, seed) -> int:
    logits = adjust_by_definition(logits, params, prompt, output)
    if params.temperature == 0:
        return int(logits.argmax())
    ranked = sorted(range(len(logits)), key=lambda t: (-logits[t], t))
    probs = np.exp((logits - logits.max()) / params.temperature)
    kept = [t for t in ranked if probs[t] >= params.min_p * probs[ranked[0]]]
    if params.top_k > 0:
        kept = kept[: params.top_k]
    if params.top_p < 1:
        total, mass, num_kept = sum(probs[t] for t in kept), 0.0, 0
        while mass < params.top_p * total:
            mass += probs[kept[num_kept]]
            num_kept += 1
        kept = kept[:num_kept]
    if not (0 < params.top_k < len(logits) or params.top_p < 1 or params.min_p > 0):
        kept.sort()  # with nothing to leave out, the distribution is in the vocabulary's order
    cumulative = np.cumsum([probs[t] for t in kept])
    number = uniform(np.array([generator_state(seed)]), np.array([len(output)]))[0]
    return kept[int(np.searchsorted(cumulative, number * cumulative[-1], side="right"))]


KINDS = [
    {"temperature": 0},
    {},
    {"temperature": 0.3},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 700},
    {"top_p": 0.1},
    {"top_p": 0.9},
    {"top_p": 0.999, "temperature": 2.0},
    {"min_p": 0.05},
    {"min_p": 0.0001, "temperature": 2.0},
    {"top_k": 20, "top_p": 0.7, "min_p": 0.02},
    {"top_k": 600, "top_p": 0.95, "temperature": 2.0},
    {"min_p": 0.001, "top_p": 0.97, "temperature": 1.5},
    {"logit_bias": {3: 8.0, 5: -100}, "top_p": 0.8},
    {"logit_bias": {4: 100}},
    {"min_tokens": 9, "stop_token_ids": [4, 6]},
    {"min_tokens": 9, "ignore_eos": True, "stop_token_ids": [4], "temperature": 0},
    {"repetition_penalty": 1.7, "temperature": 0},
    {"repetition_penalty": 0.6, "presence_penalty": 1.5, "frequency_penalty": -0.7},
    {"presence_penalty": -2, "top_k": 3},
    {"frequency_penalty": 2, "min_tokens": 4, "logit_bias": {7: 3.5}, "min_p": 0.1},
    {"allowed_token_ids": [3, 39, 8], "temperature": 0},
    {"allowed_token_ids": [0, 31, 32, 6], "top_p": 0.9, "repetition_penalty": 1.3},
    {"bad_words": ["5", "1 2", "3 4 5", "7 7"], "temperature": 0},
    {
        "bad_words": [f"{a} {b}" for a in range(12) for b in range(a)],
        "allowed_token_ids": range(30),
    },
]


def mixed_requests(num_rows, seed, vocab_size):
    rng = np.random.default_rng(seed)
    return Requests(
        [SamplingParams(**KINDS[i % len(KINDS)]) for i in range(num_rows)],
        prompts=[rng.integers(0, vocab_size, 5).tolist() for _ in range(num_rows)],
        outputs=[rng.integers(0, 12, rng.integers(0, 12)).tolist() for _ in range(num_rows)],
        seeds=rng.integers(0, 2**63, num_rows).tolist(),
    )


def make_logits(num_rows, vocab_size, seed, dtype=torch.float32, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(num_rows, vocab_size, generator=generator) * spread).to(dtype)


# 1024 is searched in blocks and stripes, 1003 has a block that is not full, 40 is smaller than one.
@pytest.mark.parametrize("vocab_size", [8192, 1024, 1003, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_batch_follows_the_definitions(vocab_size, dtype):
    requests = mixed_requests(5 * len(KINDS), vocab_size, vocab_size)
    logits = make_logits(len(requests.params), vocab_size, 1, dtype)
    assert requests.sample(logits).token_ids.tolist() == requests.by_definition(logits)


def test_ties_go_to_the_smaller_token_id():
    # bfloat16 between 0 and 1 by eighths: every value some hundred times.
    logits = (torch.randint(0, 9, (6 * len(KINDS), 2048)) / 8).bfloat16()
    requests = mixed_requests(len(logits), 5, 2048)
    assert requests.sample(logits).token_ids.tolist() == requests.by_definition(logits)


def test_all_tokens_alike():
    requests = mixed_requests(2 * len(KINDS), 6, 4096)
    logits = torch.zeros(len(requests.params), 4096)
    assert requests.sample(logits).token_ids.tolist() == requests.by_definition(logits)


def test_a_row_does_not_depend_on_the_others_nor_on_chunks(monkeypatch):
    requests = mixed_requests(3 * len(KINDS), 7, 1024)
    logits = make_logits(len(requests.params), 1024, 7)
    together = requests.sample(logits).token_ids
    for row in range(len(logits)):
        assert requests.sample(logits, np.array([row])).token_ids[0] == together[row]
    for chunk in (1, 4 * 1024, 7 * 1024):
        monkeypatch.setattr(logits_module, "CPU_CHUNK_ELEMENTS", chunk)
        assert requests.sample(logits).token_ids.tolist() == together.tolist()


def test_number_of_candidates_does_not_matter(monkeypatch):
    requests = mixed_requests(10 * len(KINDS), 8, 4096)
    logits = make_logits(len(requests.params), 4096, 8, torch.bfloat16)
    expected = requests.sample(logits).token_ids.tolist()
    for num_candidates in (2, 30, 4096):
        monkeypatch.setattr(sampler, "NUM_CANDIDATES", num_candidates)
        assert requests.sample(logits).token_ids.tolist() == expected


def test_choices_next_to_the_last_candidate(monkeypatch):
    requests = Requests([SamplingParams(top_p=0.7)] * 4000)
    logits = make_logits(4000, 8, 9, spread=1.0)
    expected = requests.sample(logits).token_ids.tolist()
    assert expected == requests.by_definition(logits)
    monkeypatch.setattr(sampler, "NUM_CANDIDATES", 2)
    assert requests.sample(logits).token_ids.tolist() == expected


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 4},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"temperature": 1.5, "top_k": 9, "top_p": 0.9, "min_p": 0.1},
    ],
    ids=str,
)
def test_tokens_are_as_frequent_as_they_are_likely(params):
    """Against the warpers of transformers, which know nothing of inverse distributions."""
    num_draws, vocab_size = 20_000, 12
    row = make_logits(1, vocab_size, 3, spread=1.5)
    params = SamplingParams(**params)
    warped = row / params.temperature
    if params.min_p:
        warped = MinPLogitsWarper(params.min_p)(None, warped)
    if params.top_k:
        warped = TopKLogitsWarper(params.top_k)(None, warped)
    if params.top_p < 1:
        warped = TopPLogitsWarper(params.top_p)(None, warped)
    expected = num_draws * warped.double().softmax(-1)[0].numpy()
    requests = Requests([params] * num_draws)
    token_ids = requests.sample(row.expand(num_draws, -1).contiguous()).token_ids
    counts = np.bincount(token_ids, minlength=vocab_size)
    assert (counts[expected == 0] == 0).all()
    possible = expected > 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < 40, "exceeded once in 10 000 times with 11 degrees of freedom"


def test_positions_of_one_request_are_independent_and_uniform():
    numbers = uniform(np.full(40_000, generator_state(1)), np.arange(40_000, dtype=np.int32))
    neighbours = uniform(np.full(40_000, generator_state(2)), np.arange(40_000, dtype=np.int32))
    assert numbers.min() >= 0
    assert numbers.max() < 1
    histogram = np.histogram2d(numbers[:-1], numbers[1:], bins=10, range=[[0, 1]] * 2)[0]
    assert ((histogram - 400) ** 2 / 400).sum() < 160, "99 degrees of freedom"
    assert abs(np.corrcoef(numbers, neighbours)[0, 1]) < 0.02


def test_uniform_numbers_are_the_published_generator():
    # The first outputs of SplitMix64 with state 1234567, as its authors' code gives them.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    numbers = uniform(np.full(3, 1234567, np.uint64), np.arange(3, dtype=np.int32))
    assert (numbers * 2**53).astype(np.uint64).tolist() == [bits >> 11 for bits in expected]


@pytest.mark.parametrize("seed", [-1, 0, 2**63, 2**64 - 1])
def test_any_seed_is_fine(seed):
    assert generator_state(seed) == generator_state(seed % 2**64)
    assert generator_state(seed) != generator_state(seed + 1)


@pytest.mark.parametrize(
    ("probs", "top_p", "kept"),
    [
        ([0.5, 0.25, 0.125, 0.125], 0.5, {0}),
        ([0.5, 0.25, 0.125, 0.125], 0.500001, {0, 1}),
        ([0.5, 0.25, 0.125, 0.125], 0.75, {0, 1}),
        ([0.5, 0.25, 0.125, 0.125], 0.8, {0, 1, 2}),
        ([0.5, 0.25, 0.125, 0.125], 1e-9, {0}),
        ([0.25, 0.25, 0.25, 0.25], 0.5, {0, 1}),
        ([0.0, 0.999, 0.001, 0.0], 0.9999, {1, 2}),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(probs, top_p, kept):
    requests = Requests([SamplingParams(top_p=top_p)] * 2000)
    logits = torch.tensor(probs).log().expand(2000, -1).contiguous()
    assert set(requests.sample(logits).token_ids.tolist()) == kept


def test_tokens_of_no_probability_are_never_chosen():
    logits = torch.full((300, 600), -torch.inf)
    logits[:, [255, 256, 599]] = 0.0
    for params in ({}, {"top_p": 0.99}, {"top_k": 5}, {"min_p": 0.1}):
        token_ids = Requests([SamplingParams(**params)] * 300).sample(logits).token_ids
        assert set(token_ids.tolist()) <= {255, 256, 599}


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repetition_penalty_is_that_of_transformers(penalty):
    prompts, outputs = [[1, 5, 5, 9]] * 8, [[3, 5, 11]] * 8
    logits = make_logits(8, 32, 11)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor([p + o for p, o in zip(prompts, outputs, strict=True)]), logits.clone()
    )
    params = SamplingParams(repetition_penalty=penalty, temperature=0)
    batch = Requests([params] * 8, prompts, outputs).batch()
    adjusted = adjust_part(logits, batch.adjustments, np.arange(8))
    assert torch.equal(adjusted, expected)


def test_ends_that_the_model_lacks_forbid_nothing():
    """The tokenizer of an adapter may have more tokens than the model."""
    logits = make_logits(1, 64, 5)
    best = int(logits.argmax())
    params = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[64, 1000])
    assert Requests([params]).sample(logits).token_ids.tolist() == [best]


def test_min_tokens_forbid_ends_until_they_are_reached():
    logits = torch.zeros(3, 16)
    logits[:, EOS], logits[:, 4], logits[:, 9] = 3, 2, 1
    params = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[4])
    requests = Requests([params] * 3, outputs=[[], [8], [8, 8]])
    assert requests.sample(logits).token_ids.tolist() == [9, 9, EOS]
    ignoring = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[4], ignore_eos=True)
    assert Requests([ignoring] * 3).sample(logits).token_ids.tolist() == [EOS] * 3
    assert Requests([ignoring]).batch().adjustments is not None
    plain = SamplingParams(temperature=0, min_tokens=2, ignore_eos=True)
    assert Requests([plain]).batch().adjustments is None, "nothing to forbid"


def test_where_all_that_is_allowed_is_forbidden_it_may_come():
    params = SamplingParams(
        temperature=0, allowed_token_ids=[EOS, 5], bad_words=["5"], min_tokens=3
    )
    logits = torch.arange(16.0).expand(3, -1)
    requests = Requests([params] * 3, outputs=[[], [5], [5, 5, 5]])
    assert requests.sample(logits).token_ids.tolist() == [5, 5, EOS]


def test_only_what_is_chosen_by_the_output_needs_it():
    for needs_output, params in (
        (False, {}),
        (False, {"bad_words": ["5", "6"], "min_tokens": 2, "logit_bias": {1: 2.0}}),
        (False, {"allowed_token_ids": [5, 6]}),
        (True, {"bad_words": ["5", "6 7"]}),
        (True, {"presence_penalty": 1}),
    ):
        assert Requests([SamplingParams(**params)] * 2).batch().needs_output == needs_output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adjusted_logits_follow_the_definitions(dtype, monkeypatch):
    """They are all that the native sampler is given, with the batch's other fields."""
    requests = mixed_requests(3 * len(KINDS), 4, 100)
    logits = make_logits(len(requests.params), 100, 2, dtype)
    expected = [
        adjust_by_definition(row, params, prompt, output)
        for row, params, prompt, output in zip(
            logits.double().numpy(), requests.params, requests.prompts, requests.outputs,
            strict=True,
        )
    ]  # fmt: skip
    monkeypatch.setattr(logits_module, "CPU_CHUNK_ELEMENTS", 700)
    batch = requests.batch(vocab_size=100)
    adjusted = adjust(logits, batch.adjustments)
    np.testing.assert_allclose(adjusted.numpy(), np.array(expected), rtol=1e-5, atol=1e-5)
    is_greedy = batch.temperature == 0
    token_ids = sample_natively(adjusted, batch)
    assert token_ids[is_greedy].tolist() == adjusted.argmax(-1).numpy()[is_greedy].tolist()
    assert (token_ids == requests.sample(logits).token_ids).mean() > 0.98


def test_slots_are_used_again_without_traces():
    state = SamplingState(1, 64)
    tokens, counts = np.zeros((1, 8), np.int32), np.ones(1, np.int32)

    def gather(params):
        request = EngineRequest(
            request_id="r",
            prompt_token_ids=[1],
            sampling_params=params,
            max_tokens=9,
            eos_token_ids=[EOS],
            seed=5,
        )
        state.add(0, request)
        batch = state.gather(np.array([0]), np.array([0]), tokens, counts, counts)
        state.remove(0)
        return batch

    fancy = gather(
        SamplingParams(
            top_k=3, top_p=0.5, min_p=0.1, logprobs=2, presence_penalty=1, logit_bias={3: 1}
        )
    )
    assert fancy.adjustments is not None
    plain = gather(SamplingParams())
    assert plain.adjustments is None
    assert plain.num_logprobs[0] < 0
    assert plain.top_k[0] > 1 << 30
    assert (plain.top_p[0], plain.min_p[0], plain.temperature[0]) == (1, 0, 1)


def test_empty_batch():
    empty = Requests([SamplingParams()]).batch(np.zeros(0, np.int64))
    output = sampler.sample(torch.zeros(0, 16), empty)
    assert output.token_ids.shape == (0,)
    assert output.logprobs is None


def scores_by_definition(logits, chosen, num_logprobs):
    ranked = sorted(range(len(logits)), key=lambda t: (-logits[t], t))
    log_probs = logits - np.log(np.exp(logits).sum())
    token_ids = [chosen, *ranked[:num_logprobs]]
    return token_ids, [log_probs[t] for t in token_ids], [1 + ranked.index(t) for t in token_ids]


def assert_scores(scores, logits, chosen, num_logprobs):
    token_ids, logprobs, ranks = scores_by_definition(logits.double().numpy(), chosen, num_logprobs)
    assert scores.token_ids == token_ids
    assert scores.ranks == ranks
    np.testing.assert_allclose(scores.logprobs, logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vocab_size", [8192, 1003, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_of_the_raw_logits(vocab_size, dtype):
    wanted = [None, 0, 1, 5, 100, None, 20, 3]
    requests = Requests(
        [
            SamplingParams(logprobs=n, temperature=2.0, logit_bias={7: 50} if i % 2 else {})
            for i, n in enumerate(wanted)
        ]
    )
    logits = make_logits(len(wanted), vocab_size, 21, dtype)
    output = requests.sample(logits)
    for row, num_logprobs in enumerate(wanted):
        if num_logprobs is None:
            assert output.logprobs[row] is None
        else:
            token_id = int(output.token_ids[row])
            expected_num = min(num_logprobs, vocab_size)
            assert_scores(output.logprobs[row], logits[row], token_id, expected_num)


def test_no_logprobs_where_nobody_asked():
    assert Requests([SamplingParams()] * 2).sample(make_logits(2, 64, 1)).logprobs is None


@pytest.mark.parametrize("num_logprobs", [0, 3])
def test_prompt_logprobs(num_logprobs, monkeypatch):
    monkeypatch.setattr(logits_module, "CPU_CHUNK_ELEMENTS", 3 * 1024)
    logits = make_logits(8, 1024, 31)
    targets = torch.cat([logits[:4].argmax(-1), torch.tensor([5, 1023, 0, 77])])
    scores = prompt_logprobs(logits, targets, num_logprobs)
    assert len(scores) == 8
    for row in range(8):
        assert_scores(scores[row], logits[row], int(targets[row]), num_logprobs)


def test_logprobs_with_ties_rank_by_token_id():
    logits = (torch.randint(0, 5, (6, 2048)) / 4).bfloat16()
    targets = torch.tensor([0, 5, 99, 700, 1500, 2047])
    for row, scores in enumerate(prompt_logprobs(logits, targets, 30)):
        assert_scores(scores, logits[row], int(targets[row]), 30)
