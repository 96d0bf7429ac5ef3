"""What transformers' implementations can't be served for, and that it is said. What they can is in
test_architectures.py."""

from __future__ import annotations

import pytest
import torch
from architecture_check import check_model
from architectures import (
    all_linears,
    architecture_of,
    other_config,
    served_linears,
    tiny_config,
    write_random_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from loraplex.engine.models import fallback
from loraplex.engine.models.config import read_model_config
from loraplex.engine.models.registry import base_model_spec

SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
GROUPED = {**SIZES, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 32}
LATENT = {
    **SIZES, "num_key_value_heads": 2, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 12, "kv_lora_rank": 8, "q_lora_rank": 8, "first_k_dense_replace": 2,
}  # fmt: skip
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mamba", **SIZES}, "MambaForCausalLM.*layers of type 'linear_attention'"),
        ({"model_type": "bloom", **SIZES}, "fails with our attention"),
        ({"model_type": "gpt_oss", **GROUPED}, "its attention has an option of its own, s_aux"),
        ({"model_type": "deepseek_v3", **LATENT}, "keys and values differ in shape"),
        ({"model_type": "falcon_h1", **GROUPED}, "layers of type 'hybrid', and all must be"),
        ({"model_type": "lfm2", **GROUPED, "layer_types": ["conv"] * 2}, "layers of type 'conv'"),
        ({"model_type": "bert", **SIZES}, "mask is neither causal nor a sliding window"),
        ({"model_type": "t5"}, "an encoder and a decoder"),
        (
            {"model_type": "seed_oss", **GROUPED, "rope_parameters": DYNAMIC_ROPE},
            "rope_type='dynamic' depends on the length",
        ),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_what_can_not_be_served_is_refused(config, message):
    hf_config = AutoConfig.for_model(**config)
    hf_config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(hf_config.model_type)]
    with pytest.raises(ValueError, match=message):
        fallback.outline_fallback(hf_config)


def test_hybrids_without_state_are_served(tmp_path, one_thread):
    """Granite 4's small models have attention in all layers."""
    config = AutoConfig.for_model(
        "granitemoehybrid", **{**GROUPED, "vocab_size": 131}, layer_types=["attention"] * 2,
        position_embedding_type="rope", shared_intermediate_size=40, num_local_experts=0,
        num_experts_per_tok=0, mamba_n_heads=4, mamba_d_head=16, max_position_embeddings=128,
        residual_multiplier=0.5, pad_token_id=2, dtype="float32",
    )  # fmt: skip
    check_model(config, served_linears(config), tmp_path, "cpu")


def test_other_heads_than_a_language_model_s_are_refused():
    hf_config = tiny_config("GLM 4")
    hf_config.architectures = ["Glm4ForSequenceClassification"]
    with pytest.raises(ValueError, match="what would generate text is a Glm4ForCausalLM"):
        fallback.outline_fallback(hf_config)


def test_tokens_that_depend_on_each_other_outside_of_attention_are_refused(monkeypatch):
    hf_config = tiny_config("GLM 4")
    hf_config.architectures = ["Glm4ForCausalLM"]
    decoder = fallback.load_fallback(None, hf_config, torch.float32, CPU, is_dummy=True)
    mlp = decoder._model.model.layers[0].mlp
    mlp.register_forward_hook(lambda module, args, output: output + args[0].roll(1, dims=1))
    with pytest.raises(ValueError, match="tokens depend on each other outside of attention"):
        fallback._check_that_only_attention_mixes_rows(decoder, hf_config.vocab_size, CPU)


def test_a_checkpoint_without_a_tensor_is_refused(tmp_path):
    config = tiny_config("GLM 4")
    write_random_model(config, tmp_path, all_linears(config))
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    hf_config = read_model_config(tmp_path / "model")
    with pytest.raises(ValueError, match=r"lacks .* model\.layers\.1\.mlp\.down_proj\.weight"):
        fallback.load_fallback(tmp_path / "model", hf_config, torch.float32, CPU, is_dummy=False)


@pytest.mark.parametrize(("model_type", "is_served"), [("laguna", True), ("glm4_moe", False)])
def test_routers_are_served_that_compute_in_the_dtype_of_the_model(model_type, is_served):
    config = other_config(model_type)
    config.architectures = [architecture_of(config)]
    paths = [module.path for module in base_model_spec(config).modules]
    assert "mlp.experts.down_proj" in paths
    assert ("mlp.gate" in paths) == is_served
