"""The engine on a CUDA device against transformers and PEFT: a mixed, chunked batch of adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracle import Oracle
from transformers import LlamaConfig, LlamaForCausalLM

from loraplex import LLM, LoRARequest, SamplingParams
from loraplex.benchmarks.synthetic_adapters import write_adapter
from loraplex.engine.models.registry import lora_spec
from loraplex.engine.runner.gpu_runner import GpuModelRunner, PendingGpuStep
from loraplex.engine.step import StepBatch

VOCAB_SIZE = 1000
LENGTHS = [1, 2, 17, 64, 200, 333]
RANKS = {"r1": 1, "r8": 8, "r12": 12, "r16": 16, "r64": 64, "r256": 256}
# How far below the likeliest token (log-probability) a choice in bfloat16 may be: logits of
# this model are about 1, and their rounding in the layers adds up to a few hundredths.
NEAR_TIE = 0.1
# With keys and values in float8. A token by chance is about 3 below.
NEAR_TIE_OF_FLOAT8 = 1.0

Case = tuple[list[int], str | None]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=256, intermediate_size=520, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=512,
        tie_word_embeddings=False, initializer_range=0.06,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapters(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    spec, _ = lora_spec(str(model_path))
    directory = tmp_path_factory.mktemp("adapters")
    modules = {"r1": ["q_proj", "v_proj"], "r12": ["down_proj"], "r64": ["o_proj", "up_proj"]}
    return {
        name: write_adapter(
            directory / name, spec, rank=rank, modules=modules.get(name), seed=rank,
            dtype=torch.bfloat16,
        )
        for name, rank in RANKS.items()
    }  # fmt: skip


@pytest.fixture(scope="module")
def cases(adapters: dict[str, Path]) -> list[Case]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist(), name)
        for length in LENGTHS
        for name in [None, *adapters]
    ]


def generate(
    model_path: Path,
    adapters: dict[str, Path],
    cases: list[Case],
    one_by_one: bool = False,
    **options,
) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    defaults = {"max_num_seqs": 32, "max_num_batched_tokens": 128, "pool_bytes": 64 << 20}
    with LLM(
        str(model_path), device="cuda", skip_tokenizer_init=True, **(defaults | options)
    ) as llm:
        outputs = []
        for batch in [[case] for case in cases] if one_by_one else [cases]:
            outputs += llm.generate(
                [prompt for prompt, _ in batch],
                params,
                lora_request=[name and LoRARequest(name, str(adapters[name])) for _, name in batch],
                use_tqdm=False,
            )
        llm.check_integrity()
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def oracle(model_path: Path, adapters: dict[str, Path]) -> Oracle:
    return Oracle(model_path, adapters)


def test_float32_tokens_equal(model_path, adapters, cases, oracle):
    results = generate(model_path, adapters, cases, dtype="float32")
    for (prompt, name), token_ids in zip(cases, results, strict=True):
        assert token_ids == oracle.score(prompt, token_ids, name).greedy_token_ids, name


@pytest.fixture(scope="module")
def bfloat16_results(model_path, adapters, cases) -> list[list[int]]:
    return generate(model_path, adapters, cases, dtype="bfloat16")


def check_choices(
    cases: list[Case], oracle: Oracle, results: list[list[int]], near_tie: float = NEAR_TIE
) -> None:
    for (prompt, name), token_ids in zip(cases, results, strict=True):
        scored = oracle.score(prompt, token_ids, name)
        gaps = [b - a for a, b in zip(scored.logprobs, scored.greedy_logprobs, strict=True)]
        assert max(gaps) < near_tie, (name, len(prompt), max(gaps))


def test_bfloat16_tokens_are_likeliest_or_near(cases, oracle, bfloat16_results):
    check_choices(cases, oracle, bfloat16_results)


def test_steps_too_large_for_graphs(model_path, adapters, cases, oracle):
    results = generate(
        model_path, adapters, cases, dtype="bfloat16", max_num_batched_tokens=4096, max_num_seqs=64
    )
    check_choices(cases, oracle, results)


def test_graphs_change_no_token(model_path, adapters, cases, bfloat16_results):
    eager = generate(model_path, adapters, cases, dtype="bfloat16", enforce_eager=True)
    assert eager == bfloat16_results


def test_preemption_and_eviction_change_no_token(model_path, adapters, cases):
    options = {"dtype": "float32", "max_num_seqs": 32}
    relaxed = generate(model_path, adapters, cases, **options)
    # A page has 48 KiB; the largest adapter takes 260 of them.
    pressed = generate(model_path, adapters, cases, **options, pool_bytes=400 * 49152)
    assert pressed == relaxed


def test_float8_kv_tokens_are_likeliest_or_near(model_path, adapters, cases):
    results = generate(model_path, adapters, cases, dtype="bfloat16", kv_cache_dtype="fp8")
    check_choices(cases, Oracle(model_path, adapters, float8_kv=True), results, NEAR_TIE_OF_FLOAT8)


def test_a_mixed_batch_equals_each_alone(model_path, adapters, cases):
    mixed = generate(model_path, adapters, cases, dtype="float32")
    alone = generate(model_path, adapters, cases[::5], one_by_one=True, dtype="float32")
    assert alone == mixed[::5]


# The last one goes through the sampler, the others through the kernel.
@pytest.mark.parametrize(
    "options",
    [{}, {"top_p": 0.9, "top_k": 40}, {"min_p": 0.05}, {"top_p": 0.9, "repetition_penalty": 1.1}],
    ids=str,
)
def test_seeded_sampling_equals_the_cpu(model_path, cases, options):
    params = SamplingParams(temperature=0.9, seed=7, max_tokens=16, ignore_eos=True, **options)
    tokens = {}
    for device in ("cpu", "cuda"):
        with LLM(str(model_path), device=device, dtype="float32", skip_tokenizer_init=True,
                 pool_bytes=64 << 20) as llm:  # fmt: skip
            outputs = llm.generate([prompt for prompt, _ in cases[:14]], params, use_tqdm=False)
        tokens[device] = [output.outputs[0].token_ids for output in outputs]
    assert tokens["cuda"] == tokens["cpu"]


def test_launching_a_step_that_samples_waits_for_nothing(model_path, cases, monkeypatch):
    launch, num_launched = GpuModelRunner.launch, 0

    def launch_without_waiting(runner: GpuModelRunner, batch: StepBatch) -> PendingGpuStep:
        nonlocal num_launched
        num_launched += 1
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(runner, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(GpuModelRunner, "launch", launch_without_waiting)
    # Rows that are greedy, plain and bounded, in one batch.
    params = [
        SamplingParams(temperature=0.7 * (i % 3), top_p=1 - 0.1 * (i % 2), seed=i, max_tokens=8,
                       ignore_eos=True)
        for i in range(9)
    ]  # fmt: skip
    with LLM(str(model_path), device="cuda", dtype="bfloat16", skip_tokenizer_init=True,
             pool_bytes=64 << 20) as llm:  # fmt: skip
        outputs = llm.generate([prompt for prompt, _ in cases[::5]], params, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [8] * 9
    assert num_launched >= 8
