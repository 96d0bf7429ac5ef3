"""Every architecture, tiny and random, against transformers and PEFT in float32."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from architectures import (
    CASES,
    FALLBACK_CASES,
    SIZES,
    architecture_of,
    tiny_config,
    write_tiny_model,
)
from model_table import DOCUMENT, render_document
from oracle import Oracle
from safetensors.torch import load_file, save_file

from loraplex import LLM, LoRARequest, SamplingParams
from loraplex.engine.config import EngineConfig
from loraplex.engine.models.config import read_model_config
from loraplex.engine.models.registry import ARCHITECTURES, build_model

PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=0, detokenize=False)
# Five at least: the case with long rope factors was trained for four positions.
PROMPT_LENGTHS = (5, 13, 40)
MAX_MODEL_LEN = 60
CPU = torch.device("cpu")
# Tensors of older checkpoints that carry nothing.
IGNORED = {
    "GPT-2": {"h.0.attn.bias": torch.ones(1), "h.0.attn.masked_bias": torch.ones(1)},
    "GPT-NeoX": {"gpt_neox.layers.1.attention.masked_bias": torch.ones(1)},
}


@pytest.mark.parametrize("case", [*CASES, *FALLBACK_CASES])
def test_a_mixed_batch_equals_transformers_and_peft(case: str, tmp_path: Path, one_thread: None):
    config = tiny_config(case)
    adapters = write_tiny_model(config, tmp_path)
    rng = random.Random(0)
    prompts, names = [], []
    for length in PROMPT_LENGTHS:
        for name in (None, *adapters):
            prompts.append([rng.randrange(SIZES["vocab_size"]) for _ in range(length)])
            names.append(name)
    options = {
        "dtype": "float32", "device": "cpu", "skip_tokenizer_init": True,
        "max_model_len": MAX_MODEL_LEN,
    }  # fmt: skip
    # So few tokens in a step that the long prompts come in chunks, beside others that decode.
    with LLM(
        str(tmp_path / "model"), max_num_batched_tokens=16, max_num_seqs=8, pool_bytes=1 << 23,
        **options,
    ) as llm:  # fmt: skip
        outputs = llm.generate(
            prompts,
            PARAMS,
            lora_request=[name and LoRARequest(name, str(adapters[name])) for name in names],
            use_tqdm=False,
        )
        llm.check_integrity()
    Oracle(tmp_path / "model", adapters).assert_equals(names, outputs)


@pytest.mark.parametrize(
    ("case", "rename"),
    [
        ("GPT-2", lambda name: name.removeprefix("transformer.")),
        ("GPT-NeoX", lambda name: name.replace("lm_head", "embed_out")),
        (
            "Gemma 3 with images",
            lambda name: name.replace("model.language_model", "language_model.model").replace(
                "model.vision_tower", "vision_tower"
            ),
        ),
        (
            "Gemma 3 with images",
            lambda name: name.replace("language_model.model", "model.language_model"),
        ),
    ],
)
def test_older_names_of_tensors_are_known(case, rename, tmp_path):
    write_tiny_model(tiny_config(case), tmp_path)
    file = tmp_path / "model" / "model.safetensors"
    tensors = {rename(name): tensor for name, tensor in load_file(file).items()}
    tensors |= IGNORED.get(case, {})
    save_file(tensors, file, metadata={"format": "pt"})
    hf_config = read_model_config(tmp_path / "model")
    build_model(EngineConfig(), tmp_path / "model", hf_config, torch.float32, 60, CPU)


def test_every_architecture_has_a_case():
    assert {architecture_of(tiny_config(case)) for case in CASES} == ARCHITECTURES.keys()


def test_the_table_of_models_is_as_tested():
    assert DOCUMENT.read_text() == render_document(), "run python tests/support/model_table.py"
