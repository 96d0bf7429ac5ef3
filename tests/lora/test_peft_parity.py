"""Adapters made and saved by PEFT itself: our B A is PEFT's delta weight."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from loraplex.benchmarks.synthetic_adapters import llama_spec
from loraplex.lora.image import unpack_image
from loraplex.lora.loader import load_adapter

SPEC = llama_spec(num_layers=3)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=32,
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "lora_alpha": 7, "target_modules": ATTENTION},
        {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
        {"r": 5, "lora_alpha": 3, "target_modules": ["down_proj"], "use_rslora": True},
        {
            "r": 8,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "up_proj", "v_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 3, "^model.layers.0.*up_proj": 17},
            "alpha_pattern": {"v_proj": 5, r"layers\.[01]\.mlp\.up_proj": 2},
        },
        {
            "r": 6,
            "lora_alpha": 12,
            "target_modules": ["k_proj", "gate_proj"],
            "use_rslora": True,
            "rank_pattern": {"k_proj": 9, "q_proj|k_proj": 1},
            "alpha_pattern": {"k_proj": 100, ".*": 4},
        },
        {"r": 4, "target_modules": r".*\.[02]\.(self_attn\.(q|v)|mlp\.down)_proj"},
        {"r": 4, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
        {"r": 4, "target_modules": "all-linear", "exclude_modules": ["o_proj"]},
        {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    ],
    ids=lambda config: ",".join(config),
)
@pytest.mark.filterwarnings("ignore")
def test_delta_weights_are_pefts(tmp_path, model, config):
    peft_model = get_peft_model(model, LoraConfig(**config))
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    peft_model.save_pretrained(tmp_path)
    # PEFT writes patterns sorted, so that what it reads back may be other than what it saved; what
    # it reads back is what counts.
    peft_model = PeftModel.from_pretrained(peft_model.unload(), tmp_path)

    # Through an image and back, so that all the way to the kernels is what PEFT computes.
    image = load_adapter(tmp_path, SPEC, 3 * 2048 + 64, torch.float32)
    weights = unpack_image(image, SPEC)

    expected = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default")
        for name, module in peft_model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert expected
    assert {SPEC.module_path(*place) for place in weights.a} == expected.keys()
    for place, a in weights.a.items():
        delta = expected[SPEC.module_path(*place)].detach()
        torch.testing.assert_close(weights.b[place] @ a, delta, rtol=1e-5, atol=1e-5)
