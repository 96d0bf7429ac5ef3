"""The embedded model and trained adapters on a CUDA device, as transformers and PEFT see them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from oracle import Oracle
from transformers import AutoTokenizer

from loraplex import LLM, LoRARequest, SamplingParams
from loraplex.engine.config import EngineConfig
from loraplex.engine.models.locate import locate_model

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "adapters"
LENGTHS = [1, 17, 100, 333, 700]
MAX_TOKENS = 32

Case = tuple[list[int], str | None]


@pytest.fixture(scope="module")
def model_path() -> Path:
    return locate_model(EngineConfig().model)


@pytest.fixture(scope="module")
def adapters() -> dict[str, Path]:
    return {path.parent.name: path.parent for path in EXAMPLES.glob("*/adapter_config.json")}


@pytest.fixture(scope="module")
def cases(model_path: Path, adapters: dict[str, Path]) -> list[Case]:
    """A question to every adapter and to the base model, and text of several lengths to all."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    prompts = json.loads((EXAMPLES / "prompts.json").read_text())
    cases: list[Case] = []
    for name in [None, *adapters]:
        question = prompts["everyone"] if name is None else prompts["adapters"][name]
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        cases.append((tokenizer(chat).input_ids, name))
    text = tokenizer((ROOT / "LICENSE").read_text()).input_ids
    for i, length in enumerate(LENGTHS):
        cases += [(text[i * 64 : i * 64 + length], name) for name in [None, *adapters]]
    return cases


def generate(cases: list[Case], adapters: dict[str, Path], **options) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
    with LLM(device="cuda", max_num_batched_tokens=512, max_num_seqs=64,
             pool_bytes=1 << 30, **options) as llm:  # fmt: skip
        outputs = llm.generate(
            [prompt for prompt, _ in cases],
            params,
            lora_request=[name and LoRARequest(name, str(adapters[name])) for _, name in cases],
            use_tqdm=False,
        )
        llm.check_integrity()
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def oracle(model_path: Path, adapters: dict[str, Path]) -> Oracle:
    return Oracle(model_path, adapters, device="cuda")


def test_float32_tokens_equal(cases, adapters, oracle):
    results = generate(cases, adapters, dtype="float32")
    for (prompt, name), token_ids in zip(cases, results, strict=True):
        expected = oracle.score(prompt, token_ids, name).greedy_token_ids
        assert token_ids == expected, (name, len(prompt))


def test_bfloat16_diverges_only_at_near_ties(cases, adapters, model_path, oracle, record_property):
    """A near-tie: likelihoods as close as twice what bfloat16 makes of them in transformers."""
    results = generate(cases, adapters, dtype="bfloat16")
    rounded = Oracle(model_path, adapters, device="cuda", dtype=torch.bfloat16)
    gaps, rounding_errors, num_diverged = [], [], 0
    for (prompt, name), token_ids in zip(cases, results, strict=True):
        scored = oracle.score(prompt, token_ids, name)
        pairs = zip(token_ids, scored.greedy_token_ids, strict=True)
        first = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
        if first is not None:
            num_diverged += 1
            gaps.append(scored.greedy_logprobs[first] - scored.logprobs[first])
        of_rounded = rounded.score(prompt, token_ids, name).logprobs
        rounding_errors += [abs(a - b) for a, b in zip(scored.logprobs, of_rounded, strict=True)]
    record_property("num_diverged", num_diverged)
    record_property("largest_gap", max(gaps, default=0.0))
    record_property("largest_rounding_error", max(rounding_errors))
    assert max(gaps, default=0.0) <= 2 * max(rounding_errors)
    assert num_diverged < len(cases)


def test_graphs_change_no_float32_token(cases, adapters):
    """In bfloat16 they may at near-ties: graphs pad batches, and products of other sizes round
    differently."""
    in_graphs = generate(cases, adapters, dtype="float32")
    assert generate(cases, adapters, dtype="float32", enforce_eager=True) == in_graphs
