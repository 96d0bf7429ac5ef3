"""Beam search against transformers' and against all sequences that there are."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_model import tiny_llm, write_peft_adapter, write_tiny_model
from transformers import AutoModelForCausalLM

from loraplex.engine.beam_search import BeamSearch, BeamSearchParams
from loraplex.engine.lora_request import LoRARequest
from loraplex.engine.messages import EngineRequest
from loraplex.engine.outputs import CompletionOutput, Logprob, RequestOutput
from loraplex.engine.sampling_params import SamplingParams

PROMPT = [5, 9, 2, 7]
Score = Callable[[list[int]], np.ndarray]


def search(score: Score, eos_token_ids: list[int], **params) -> list[tuple[list[int], float]]:
    """The sequences, without the prompt, and their log-probabilities. score: tokens to the next
    ones' log-probabilities."""
    params = BeamSearchParams(**params)
    request = EngineRequest(
        request_id="r",
        prompt_token_ids=PROMPT,
        sampling_params=SamplingParams(),
        max_tokens=params.max_tokens,
        eos_token_ids=eos_token_ids,
        seed=0,
    )
    found = BeamSearch(request, params)
    while not found.is_done:
        outputs = []
        for prompt in found.prompts():
            logprobs = score(prompt["prompt_token_ids"])
            best = np.argsort(-logprobs, kind="stable")[: found.step_params.logprobs]
            entries = {int(t): Logprob(float(logprobs[t]), i + 1) for i, t in enumerate(best)}
            completion = CompletionOutput(0, "", [], logprobs=[entries])
            outputs.append(RequestOutput("", None, [], [completion], True))
        found.extend(outputs)
    sequences = found.output(None).sequences
    return [(sequence.tokens[len(PROMPT) :], sequence.cum_logprob) for sequence in sequences]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(model_path):
    return AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)


def reference(model, eos_token_ids: list[int], **params) -> list[list[int]]:
    """transformers', without padding."""
    sequences = model.generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT), dtype=torch.int64),
        num_beams=params["beam_width"],
        num_return_sequences=params["beam_width"],
        max_new_tokens=params["max_tokens"],
        length_penalty=params["length_penalty"],
        early_stopping="never",
        do_sample=False,
        eos_token_id=eos_token_ids or None,
        pad_token_id=-1 if not eos_token_ids else model.config.vocab_size - 1,
    )
    ends, found = {*eos_token_ids}, []
    for sequence in sequences[:, len(PROMPT) :].tolist():
        end = next((i + 1 for i, token in enumerate(sequence) if token in ends), len(sequence))
        found.append(sequence[:end])
    return found


@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 3.0, -1.0])
@pytest.mark.parametrize("num_eos", [0, 1, 3])
def test_sequences_are_those_of_transformers(model, num_eos, length_penalty):
    @torch.inference_mode()
    def score(token_ids: list[int]) -> np.ndarray:
        return model(torch.tensor([token_ids])).logits[0, -1].float().log_softmax(-1).numpy()

    # Likely ones, so that sequences end early.
    eos_token_ids = np.argsort(-score(PROMPT))[1 : 1 + num_eos].tolist()
    params = {"beam_width": 4, "max_tokens": 7, "length_penalty": length_penalty}
    found = search(score, eos_token_ids, include_stop_str_in_output=True, **params)
    assert [tokens for tokens, _ in found] == reference(model, eos_token_ids, **params)


def test_a_wide_search_finds_the_best_of_all():
    table = np.random.default_rng(3).normal(size=(8, 4)) * 2
    table -= np.log(np.exp(table).sum(-1, keepdims=True))

    def score(token_ids: list[int]) -> np.ndarray:
        return table[(token_ids[-1] + 3 * len(token_ids)) % 8]

    def total(tokens: tuple[int, ...]) -> float:
        prompts = ([*PROMPT, *tokens[:i]] for i in range(len(tokens)))
        return sum(score(prompt)[token] for prompt, token in zip(prompts, tokens, strict=True))

    every = [(*start, 3) for n in range(3) for start in itertools.product(range(3), repeat=n)]
    every += itertools.product(range(3), repeat=3)
    expected = sorted(every, key=lambda tokens: total(tokens) / len(tokens), reverse=True)
    found = search(score, [3], beam_width=40, max_tokens=3, include_stop_str_in_output=True)
    assert [tuple(tokens) for tokens, _ in found] == expected
    assert [logprob for _, logprob in found] == pytest.approx([total(t) for t in expected])


def test_offline_with_an_adapter(model, model_path, tmp_path):
    write_peft_adapter(model_path, tmp_path / "a")
    params = {"beam_width": 3, "max_tokens": 6, "length_penalty": 1.0}
    loras = [None, LoRARequest("a", str(tmp_path / "a")), None]
    with tiny_llm(model_path) as llm:
        outputs = llm.beam_search(
            [PROMPT, PROMPT, {"prompt_token_ids": PROMPT}],
            BeamSearchParams(ignore_eos=True, **params),
            lora_request=loras,
        )
        plain, adapted, again = (output.sequences for output in outputs)
        expected = reference(model, [], **params)
        assert [s.tokens for s in plain] == [PROMPT + tokens for tokens in expected]
        assert [s.tokens for s in again] == [s.tokens for s in plain]
        assert adapted[0].tokens != plain[0].tokens
        assert {s.finish_reason for s in plain} == {"length"}
        greedy = llm.generate(
            [PROMPT], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
        )
        (alone,) = llm.beam_search(
            PROMPT, BeamSearchParams(beam_width=1, max_tokens=6, ignore_eos=True)
        )
        assert alone.sequences[0].tokens == PROMPT + greedy[0].outputs[0].token_ids
        llm.check_integrity()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("beam_width", 0), ("beam_width", 65), ("beam_width", True), ("max_tokens", 0),
        ("temperature", 0.5), ("length_penalty", float("nan")), ("length_penalty", "1"),
    ],
)  # fmt: skip
def test_what_is_not_allowed_is_named(field, value):
    with pytest.raises(ValueError, match=rf"^{field}=.* is not allowed: it must be "):
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 2, field: value})
