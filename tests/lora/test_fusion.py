"""Adapters of models that fuse what the base model splits, and the other way round; PEFT made
them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from loraplex.benchmarks.synthetic_adapters import adapter_tensors, llama_spec, write_adapter
from loraplex.lora.image import unpack_image
from loraplex.lora.loader import load_adapter
from loraplex.lora.spec import AdapterError, BaseModelSpec, LoRAModule

SPLIT = llama_spec(num_layers=2)
FUSED = replace(
    SPLIT,
    modules=(
        LoRAModule("qkv_proj", "self_attn.qkv_proj", 64, 128),
        LoRAModule("o_proj", "self_attn.o_proj", 64, 64),
        LoRAModule("gate_up_proj", "mlp.gate_up_proj", 64, 192),
        LoRAModule("down_proj", "mlp.down_proj", 96, 64),
    ),
)
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "pad_token_id": 0,
}
# Of each fused module: the parts' names, and where their outputs end.
PARTS = {
    "qkv_proj": (["q_proj", "k_proj", "v_proj"], [64, 96, 128]),
    "gate_up_proj": (["gate_proj", "up_proj"], [96, 192]),
}


def save_with_peft(model, path, **config) -> dict[str, torch.Tensor]:
    """Delta weights by module, as PEFT has them."""
    torch.manual_seed(1)
    peft_model = get_peft_model(model, LoraConfig(lora_alpha=7, **config))
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    peft_model.save_pretrained(path)
    peft_model = PeftModel.from_pretrained(peft_model.unload(), path)
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in peft_model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def loaded_deltas(path, spec: BaseModelSpec) -> dict[str, torch.Tensor]:
    weights = unpack_image(load_adapter(path, spec, 8192, torch.float32), spec)
    return {spec.module_path(*place): weights.b[place] @ a for place, a in weights.a.items()}


def assert_close(left, right) -> None:
    assert left.keys() == right.keys()
    for name, delta in left.items():
        torch.testing.assert_close(delta, right[name], rtol=1e-5, atol=2e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_fused_adapter_serves_split_modules(tmp_path):
    model = Phi3ForCausalLM(Phi3Config(**SHAPE))
    deltas = save_with_peft(
        model, tmp_path, r=5, target_modules=["qkv_proj", "gate_up_proj", "down_proj"]
    )
    expected = {}
    for name, delta in deltas.items():
        owner, _, module = name.rpartition(".")
        parts, ends = PARTS.get(module, ([module], [delta.shape[0]]))
        for part, end, start in zip(parts, ends, [0, *ends], strict=False):
            expected[f"{owner}.{part}"] = delta[start:end]
    assert_close(loaded_deltas(tmp_path, SPLIT), expected)


@pytest.mark.parametrize(
    "targets",
    [
        "all-linear",
        ["q_proj", "v_proj"],
        ["q_proj", "up_proj"],
        ["k_proj", "gate_proj"],
        ["v_proj"],
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_a_split_adapter_serves_fused_modules(tmp_path, targets):
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    deltas = save_with_peft(
        model, tmp_path, r=5, target_modules=targets, rank_pattern={"k_proj": 9}
    )
    expected = {}
    for layer in range(2):
        for module in FUSED.modules:
            owner = f"model.layers.{layer}.{module.path.removesuffix(module.name)}"
            parts, ends = PARTS.get(module.name, ([module.name], [module.out_features]))
            fused = torch.zeros(module.out_features, module.in_features)
            for part, end, start in zip(parts, ends, [0, *ends], strict=False):
                fused[start:end] = deltas.get(owner + part, torch.zeros(1))
            if fused.any():
                expected[owner + module.name] = fused
    assert_close(loaded_deltas(tmp_path, FUSED), expected)


def refusal(path, spec: BaseModelSpec) -> str:
    with pytest.raises(AdapterError) as caught:
        load_adapter(path, spec, 8192, torch.float32)
    return str(caught.value)


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    wide = write_adapter(tmp_path / "wide", llama_spec(num_layers=2, kv_size=48), rank=4)
    assert "k_proj.lora_B.weight' has shape [48, 4], expected [32, 4]" in refusal(wide, SPLIT)
    # q, k and v of other sizes than the fused module has room for.
    message = "q_proj.lora_B.weight' has shape [64, 4], expected [32, 4]: in the base model qkv_"
    assert message in refusal(wide, FUSED)
    wider = write_adapter(tmp_path / "wider", llama_spec(hidden=200), rank=4, modules=["q_proj"])
    assert "q_proj.lora_A.weight' has shape [4, 200], expected [4, 64]" in refusal(wider, FUSED)
    tall = llama_spec(hidden=64, kv_size=100)
    tall = write_adapter(tmp_path / "tall", tall, rank=4, modules=["k_proj"])
    assert "k_proj.lora_B.weight' has shape [100, 4], expected [63, 4]" in refusal(tall, FUSED)
    large = write_adapter(
        tmp_path / "large", SPLIT, rank=96, modules=["q_proj", "k_proj", "v_proj"]
    )
    message = "is for a part of model.layers.0.self_attn.qkv_proj, where ranks add up to 288"
    assert message in refusal(large, FUSED)


@pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj"])
def test_one_output_twice_is_refused(tmp_path, part):
    tensors = adapter_tensors(SPLIT, rank=4, modules=[part], layers=[0])
    tensors |= adapter_tensors(FUSED, rank=4, modules=["qkv_proj"], layers=[0])
    path = write_adapter(
        tmp_path, SPLIT, rank=4, tensors=tensors, target_modules=[part, "qkv_proj"]
    )
    for spec in (SPLIT, FUSED):
        assert "is for outputs that 'base_model.model.model.layers.0" in refusal(path, spec)
