"""Every architecture, tiny and random, against transformers and PEFT in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architecture_check import check_model
from architectures import (
    CASES,
    FALLBACK_CASES,
    OTHER_MODEL_TYPES,
    all_linears,
    architecture_of,
    other_config,
    served_linears,
    tiny_config,
    write_random_model,
)
from model_table import DOCUMENT, render_document
from safetensors.torch import load_file, save_file

from loraplex.engine.config import EngineConfig
from loraplex.engine.models.config import read_model_config
from loraplex.engine.models.registry import ARCHITECTURES, build_model

CPU = torch.device("cpu")
# Tensors of older checkpoints that carry nothing.
IGNORED = {
    "GPT-2": {"h.0.attn.bias": torch.ones(1), "h.0.attn.masked_bias": torch.ones(1)},
    "GPT-NeoX": {"gpt_neox.layers.1.attention.masked_bias": torch.ones(1)},
}


@pytest.mark.parametrize("case", [*CASES, *FALLBACK_CASES])
def test_a_mixed_batch_equals_transformers_and_peft(case: str, tmp_path: Path, one_thread: None):
    config = tiny_config(case)
    check_model(config, all_linears(config), tmp_path, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("model_type", OTHER_MODEL_TYPES)
def test_other_models_of_transformers_equal_it(model_type: str, tmp_path: Path, one_thread: None):
    config = other_config(model_type)
    check_model(config, served_linears(config), tmp_path, "cpu")


@pytest.mark.parametrize(
    ("case", "rename"),
    [
        ("GPT-2", lambda name: name.removeprefix("transformer.")),
        ("Llama 3", lambda name: name.removeprefix("model.")),
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
    config = tiny_config(case)
    write_random_model(config, tmp_path, all_linears(config))
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
