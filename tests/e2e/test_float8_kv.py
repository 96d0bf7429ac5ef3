"""The embedded model on a KV cache of float8, against transformers on one.

Where a rounding in float32 moves a key or a value to the next number of float8, layers after it
move more of them, so that no two computations agree on all log-probabilities. But they agree better
with each other than with a cache of float32, and far better than with another adapter's.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from oracle import Oracle

from loraplex import LLM, EngineConfig, LoRARequest, RequestOutput, SamplingParams
from loraplex.engine.models.registry import lora_spec

# Mean difference of log-probabilities, in nats. It is 0.05 and 0.16; to a cache of float32 it is
# 0.15 and more, to another adapter 1 and more.
MEAN_ERROR = {"float32": 0.09, "bfloat16": 0.35}
NAMES = ["r1", "r4", "r8", "r12", "r16", None]


@pytest.fixture(scope="module")
def page_bytes() -> int:
    """What a page of the embedded model takes in bfloat16, halved."""
    return lora_spec(EngineConfig().model, dtype="bfloat16")[1] // 2


@pytest.fixture(scope="module")
def oracle(model_path: Path, adapters: dict[str, Path]) -> Oracle:
    return Oracle(model_path, {name: adapters[name] for name in NAMES if name}, float8_kv=True)


@pytest.fixture(scope="module")
def prompts(long_text_ids: list[int]) -> list[list[int]]:
    return [long_text_ids[150 * i : 150 * i + 40 + 7 * i] for i in range(6)]


def generate(
    llm: LLM,
    prompts: list[list[int]],
    adapters: dict[str, Path],
    names: list[str | None],
    max_tokens: int,
) -> list[RequestOutput]:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=0)
    loras = [name and LoRARequest(name, str(adapters[name])) for name in names]
    outputs = llm.generate(prompts, params, lora_request=loras, use_tqdm=False)
    llm.check_integrity()
    return outputs


def mean_error(oracle: Oracle, outputs: list[RequestOutput], names: list[str | None]) -> float:
    errors = []
    for output, name in zip(outputs, names, strict=True):
        completion = output.outputs[0]
        scored = oracle.score(output.prompt_token_ids, completion.token_ids, name)
        errors += [
            abs(logprobs[token_id].logprob - expected)
            for token_id, logprobs, expected in zip(
                completion.token_ids, completion.logprobs, scored.logprobs, strict=True
            )
        ]
    return sum(errors) / len(errors)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mixed_batches_in_chunks_and_from_the_prefix_cache(
    dtype, oracle, prompts, adapters, page_bytes
):
    options = {"max_num_batched_tokens": 100, "max_num_seqs": 8}
    with LLM(dtype=dtype, kv_cache_dtype="fp8", **options) as llm:
        assert llm.stats()["page_bytes"] == page_bytes
        for num_hits in (0, 288):
            outputs = generate(llm, prompts, adapters, NAMES, max_tokens=24)
            assert llm.stats()["prefix_hit_tokens"] == num_hits
            assert mean_error(oracle, outputs, NAMES) < MEAN_ERROR[dtype]


def test_preemption(oracle, prompts, adapters, page_bytes):
    names = ["r1", None] * 3
    options = {"dtype": "float32", "max_model_len": 144, "pool_bytes": 30 * page_bytes}
    with LLM(kv_cache_dtype="fp8", **options) as llm:
        outputs = generate(llm, prompts, adapters, names, max_tokens=60)
        assert llm.stats()["preemptions"] > 0
    assert mean_error(oracle, outputs, names) < MEAN_ERROR["float32"]
