"""A model spread over two processes on the CPU computes what it does in one."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread

import pytest
import torch
from architecture_check import check_batch
from architectures import all_linears, architecture_of, tiny_config, write_random_model
from quantised_models import SHAPE
from tiny_model import grow, tiny_llm, write_peft_adapter, write_tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from loraplex import LLM, LoRARequest, SamplingParams
from loraplex.benchmarks.synthetic_adapters import write_adapter
from loraplex.engine.models.registry import lora_spec, outline_model
from loraplex.engine.models.shards import check_shardable, shard_config
from loraplex.engine.runner import parallel_device

OPTIONS = {
    "dtype": "float32", "device": "cpu", "skip_tokenizer_init": True, "max_num_seqs": 8,
    "max_num_batched_tokens": 48, "max_model_len": 96,
}  # fmt: skip
# Divided by outputs, divided by inputs, and both.
ADAPTERS = {
    "r1": (1, ["q_proj", "v_proj", "up_proj"]),
    "r8": (8, ["o_proj", "down_proj"]),
    "r20": (20, ["k_proj", "gate_proj", "down_proj"]),
}

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
# Both processes have the same KV head.
ONE_KV_HEAD = {"num_attention_heads": 4, "num_key_value_heads": 1}
# By case: how it differs from the ordinary tests', where something is odd.
DIVISIBLE: dict[str, dict[str, object]] = {
    "Mixtral": HEADS,
    "Qwen3-MoE, a dense layer": HEADS,
    "Phi-3": HEADS,
    "GPT-2": {"num_attention_heads": 4},
    "GPT-NeoX": {"num_attention_heads": 4},
    "Phi-2, norms on q and k": HEADS,
    "Command-R+": HEADS,
    "Command-R7B": HEADS,
    "Gemma 3": HEADS,
    "StarCoder2": HEADS,
    "Granite": ONE_KV_HEAD,
    "StableLM": {"hidden_size": 256, **HEADS},
    "SmolLM3": HEADS,
    "OLMo 2": HEADS,
    "Falcon 7B": {"num_attention_heads": 4},
    "Falcon 40B": {},
    "Falcon, one after the other": {"num_attention_heads": 4},
}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE | {"vocab_size": 102, "attention_bias": True, "mlp_bias": True})
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapters(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    spec, _ = lora_spec(str(model_path))
    directory = tmp_path_factory.mktemp("adapters")
    return {
        name: write_adapter(directory / name, spec, rank=rank, modules=modules, seed=rank)
        for name, (rank, modules) in ADAPTERS.items()
    }


def generate(llm: LLM, adapters: dict[str, Path], scores_prompts: bool = True) -> list:
    """Greedy and sampled requests, of all adapters and none. (Prompts that are scored are computed,
    whatever is cached of them.)"""
    generator = torch.Generator().manual_seed(1)
    cases = [
        (torch.randint(102, (35 + 4 * i,), generator=generator).tolist(), name, temperature)
        for i, name in enumerate([None, *adapters, None, None, None])
        for temperature in (0.0, 0.8)
    ]
    outputs = llm.generate(
        [prompt for prompt, _, _ in cases],
        [
            SamplingParams(temperature=temperature, seed=3, max_tokens=36, ignore_eos=True,
                           logprobs=2, prompt_logprobs=0 if scores_prompts else None)
            for _, _, temperature in cases
        ],
        lora_request=[name and LoRARequest(name, str(adapters[name])) for _, name, _ in cases],
        use_tqdm=False,
    )  # fmt: skip
    llm.check_integrity()
    return outputs


def check_equal(outputs: list, expected: list) -> None:
    for output, other in zip(outputs, expected, strict=True):
        completion, reference = output.outputs[0], other.outputs[0]
        assert completion.token_ids == reference.token_ids
        pairs = [
            *zip(completion.logprobs, reference.logprobs, strict=True),
        ]
        if output.prompt_logprobs is not None:
            pairs += zip(output.prompt_logprobs[1:], other.prompt_logprobs[1:], strict=True)
        for ours, theirs in pairs:
            assert {k: v.logprob for k, v in ours.items()} == pytest.approx(
                {k: v.logprob for k, v in theirs.items()}, abs=1e-3
            )


def test_two_processes_equal_one(model_path, adapters):
    """With adapters, prefix cache and preemption; and a lost process is told of."""
    with LLM(str(model_path), **OPTIONS) as llm:
        expected = generate(llm, adapters)
        page_bytes, pages = llm.stats()["page_bytes"], 44
    with LLM(
        str(model_path), tensor_parallel_size=2, pool_bytes=pages * page_bytes // 2, **OPTIONS
    ) as llm:
        assert llm.stats()["page_bytes"] == page_bytes // 2
        assert llm.stats()["pages_total"] == pages - 1
        check_equal(generate(llm, adapters), expected)
        assert llm.stats()["preemptions"] > 0
        assert llm.stats()["adapter_evictions"] > 0
        check_equal(generate(llm, adapters, scores_prompts=False), expected)
        assert llm.stats()["prefix_hit_tokens"] > 0
        (worker,) = llm._core._device._workers._processes
        worker.kill()
        worker.wait()
        with pytest.raises(RuntimeError, match="worker is gone|[Cc]onnection"):
            generate(llm, adapters)


def test_sizes_that_do_not_divide_are_refused_by_name(model_path):
    with pytest.raises(ValueError, match="tensor_parallel_size=3 .*divide num_attention_heads=4"):
        LLM(str(model_path), tensor_parallel_size=3, **OPTIONS)
    config = tiny_config("Llama 2", vocab_size=132, num_attention_heads=12, num_key_value_heads=4)
    with pytest.raises(ValueError, match="tensor_parallel_size=6 .*multiple of, num_key_value.*=4"):
        shard_config(config, 6)


class WorkerThread:
    """In place of a worker's process, which takes seconds to start."""

    def __init__(self, command: list[str], pass_fds: list[int], **options: object) -> None:
        connection = Connection(os.dup(pass_fds[0]))
        self._thread = Thread(target=parallel_device.serve, args=(connection,), daemon=True)
        self._thread.start()

    def wait(self, timeout: float) -> None:
        self._thread.join(timeout)

    def kill(self) -> None:
        raise AssertionError("the worker has not ended")


@pytest.fixture
def worker_threads(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.setattr(parallel_device.subprocess, "Popen", WorkerThread)


@pytest.mark.parametrize("case", [*DIVISIBLE])
def test_architectures_in_two_shares_equal_transformers(
    case: str, tmp_path: Path, worker_threads: None
):
    """With adapters on all that they may be on."""
    config = tiny_config(case, vocab_size=132, **DIVISIBLE[case])
    adapters = write_random_model(config, tmp_path, all_linears(config))
    check_batch(tmp_path / "model", adapters, "cpu", tensor_parallel_size=2)


@pytest.mark.parametrize(
    ("case", "heads", "count"),
    [
        ("Phi-3", ONE_KV_HEAD, 2),
        ("Command-R+", {**HEADS, "attention_bias": True}, 4),
        ("OLMo 2", HEADS, 4),
    ],
)
def test_processes_that_have_the_same_kv_heads_equal_transformers(
    case: str, heads: dict[str, object], count: int, tmp_path: Path, worker_threads: None
):
    """q, k and v in one tensor and in three; norms by head and of all; magnitudes."""
    config = tiny_config(case, vocab_size=132, **heads)
    targets = {"target_modules": "all-linear", "use_dora": True}
    adapters = write_random_model(config, tmp_path, targets)
    check_batch(tmp_path / "model", adapters, "cpu", tensor_parallel_size=count)


@pytest.mark.parametrize("kind", ["use_dora", "lora_bias"])
@pytest.mark.parametrize("case", ["Phi-3", "GPT-2", "StarCoder2"])
def test_magnitudes_and_biases_in_two_shares_equal_peft(
    case: str, kind: str, tmp_path: Path, worker_threads: None
):
    """They depend on weights and biases of which every process has a part."""
    config = tiny_config(case, vocab_size=132, **DIVISIBLE[case])
    targets = {"target_modules": "all-linear", kind: True}
    adapters = write_random_model(config, tmp_path, targets)
    check_batch(tmp_path / "model", adapters, "cpu", tensor_parallel_size=2)


ENDS: dict[str, dict[str, object]] = {
    # PEFT saves the base model's matrices with the first.
    "LoRA": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "matrices": {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens": {"target_modules": ["v_proj"], "trainable_token_indices": [3, 65, 66, 131]},
}


@pytest.mark.parametrize("kind", ENDS)
def test_parts_in_embedding_and_head_in_two_shares_equal_peft(
    kind: str, tmp_path: Path, worker_threads: None
):
    config = tiny_config("Qwen3", vocab_size=132, **HEADS)
    adapters = write_random_model(config, tmp_path, ENDS[kind])
    check_batch(tmp_path / "model", adapters, "cpu", tensor_parallel_size=2)


@pytest.mark.filterwarnings("ignore")
def test_added_tokens_in_two_shares(tmp_path: Path, worker_threads: None):
    model_path = write_tiny_model(tmp_path / "model", vocab_size=212)
    grown = grow(model_path, tmp_path / "grown", 250)
    adapter = write_peft_adapter(
        grown, tmp_path / "own", save_embedding_layers=True, target_modules="all-linear"
    )
    params, outputs = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True), []
    for size in (1, 2):
        with tiny_llm(model_path, tensor_parallel_size=size) as llm:
            lora = LoRARequest("own", str(adapter))
            (output,) = llm.generate([[7, 249, 3]], params, lora_request=lora, use_tqdm=False)
            outputs.append(output.outputs[0].token_ids)
    assert outputs[0] == outputs[1]
    assert max(outputs[0]) >= 212


@pytest.mark.parametrize(("case", "count"), [("StableLM 2 12B", 2), ("OPT", 2), ("Falcon 40B", 4)])
def test_other_architectures_are_refused_by_name(case: str, count: int):
    config = tiny_config(case)
    config.architectures = [architecture_of(config)]
    outline = outline_model(config)
    with pytest.raises(
        ValueError, match=rf"tensor_parallel_size={count} is not \w+ for {type(outline).__name__}"
    ):
        check_shardable(outline, count)
    check_shardable(outline, 1)
