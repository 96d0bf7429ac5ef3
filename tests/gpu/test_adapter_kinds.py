"""Adapters that are more than A and B, on a CUDA device: those steps run without graphs."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tiny_model import (
    VOCAB_SIZE,
    Oracles,
    check_against_peft,
    tiny_llm,
    write_peft_adapter,
    write_tiny_model,
)

from loraplex import LoRARequest

PLAIN = {"target_modules": "all-linear"}
CONFIGS = {
    "plain": PLAIN,
    "dora": {**PLAIN, "use_dora": True},
    "bias": {"target_modules": ["q_proj", "down_proj"], "bias": "lora_only"},
    "activated": {**PLAIN, "alora_invocation_tokens": [7, 8]},
    "ends": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "saved": {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "tokens": {"target_modules": ["v_proj"], "trainable_token_indices": [*range(3, 200, 9)]},
}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(
        tmp_path_factory.mktemp("model"),
        hidden_size=256,
        intermediate_size=520,
        head_dim=64,
        attention_bias=True,
        mlp_bias=True,
        initializer_range=0.06,
    )


@pytest.mark.parametrize("enforce_eager", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_every_kind_equals_peft(model_path, tmp_path, enforce_eager):
    adapters = {
        name: write_peft_adapter(model_path, tmp_path / name, seed, **config)
        for seed, (name, config) in enumerate(CONFIGS.items())
    }
    requests = {name: LoRARequest(name, str(path)) for name, path in adapters.items()}
    rng = random.Random(0)
    prompts = [[rng.randrange(10, VOCAB_SIZE) for _ in range(n)] for n in (2, 20, 90)]
    for prompt in prompts:
        middle = len(prompt) // 2 - 1
        prompt[middle : middle + 2] = [7, 8]
    options = {"device": "cuda", "pool_bytes": 256 << 20, "enforce_eager": enforce_eager}
    with tiny_llm(model_path, **options) as llm:
        check_against_peft(llm, Oracles(model_path, adapters), requests, prompts)
