"""Float32 greedy tokens and log-probabilities, against transformers and PEFT."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from oracle import Oracle

from loraplex import LLM, LoRARequest, SamplingParams

Case = tuple[list[int], str | None]


def make_cases(
    text: list[int], adapters: dict[str, Path], lengths: list[int]
) -> list[tuple[list[int], str | None]]:
    """Every prompt length with the base model and with every adapter, shuffled."""
    rng = random.Random(0)
    cases = []
    for length in lengths:
        for name in [None, *adapters]:
            start = rng.randrange(len(text) - length)
            cases.append((text[start : start + length], name))
    rng.shuffle(cases)
    return cases


def generate(llm: LLM, cases: list[Case], adapters: dict[str, Path], params: SamplingParams):
    return llm.generate(
        [prompt for prompt, _ in cases],
        params,
        lora_request=[name and LoRARequest(name, str(adapters[name])) for _, name in cases],
        use_tqdm=False,
    )


def check(model_path: Path, adapters: dict[str, Path], cases: list[Case], max_tokens: int) -> None:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=0)
    with LLM(dtype="float32", max_num_batched_tokens=512, max_num_seqs=64) as llm:
        outputs = generate(llm, cases, adapters, params)
        llm.check_integrity()
    Oracle(model_path, adapters).assert_equals([name for _, name in cases], outputs)


def test_a_mixed_batch_equals_transformers_and_peft(model_path, adapters, long_text_ids):
    cases = make_cases(long_text_ids, adapters, lengths=[1, 17, 100])
    check(model_path, adapters, cases, max_tokens=8)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_prompts_of_all_lengths_equal_transformers_and_peft(model_path, adapters, long_text_ids):
    lengths = [1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 33, 64, 100, 127, 200, 333, 500, 750, 1100, 1500]
    cases = make_cases(long_text_ids, adapters, lengths)
    check(model_path, adapters, cases, max_tokens=12)


@pytest.fixture(scope="module")
def few_cases(adapters, long_text_ids) -> list[Case]:
    return make_cases(long_text_ids, adapters, lengths=[1, 40])


PARAMS = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)


@pytest.fixture(scope="module")
def expected(few_cases, adapters) -> list[list[int]]:
    with LLM(dtype="float32") as llm:
        outputs = generate(llm, few_cases, adapters, PARAMS)
    return [output.outputs[0].token_ids for output in outputs]


def test_one_by_one_gives_the_same_tokens_as_mixed(few_cases, adapters, expected):
    with LLM(dtype="float32", enable_prefix_caching=False) as llm:
        outputs = [generate(llm, [case], adapters, PARAMS)[0] for case in few_cases]
    assert [output.outputs[0].token_ids for output in outputs] == expected


def test_prefix_cache_hits_give_the_same_tokens(few_cases, adapters, expected):
    with LLM(dtype="float32") as llm:
        generate(llm, few_cases, adapters, PARAMS)
        outputs = generate(llm, few_cases, adapters, PARAMS)
        assert llm.stats()["prefix_hit_tokens"] > 0
    assert [output.outputs[0].token_ids for output in outputs] == expected


def test_preemption_gives_the_same_tokens(adapters, long_text_ids):
    cases = [(long_text_ids[i * 40 : i * 40 + 40], None) for i in range(6)]
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    with LLM(dtype="float32", max_model_len=128) as llm:
        relaxed = generate(llm, cases, adapters, params)
        page_bytes = llm.stats()["page_bytes"]
    with LLM(dtype="float32", max_model_len=128, pool_bytes=25 * page_bytes) as llm:
        pressed = generate(llm, cases, adapters, params)
        assert llm.stats()["preemptions"] > 0
        llm.check_integrity()
    assert [o.outputs[0].token_ids for o in pressed] == [o.outputs[0].token_ids for o in relaxed]
