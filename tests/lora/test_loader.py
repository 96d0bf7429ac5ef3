"""What is loaded, value by value, and how what does not fit is refused: whole, by tensor name."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from loraplex.benchmarks.synthetic_adapters import adapter_tensors, llama_spec, write_adapter
from loraplex.lora import adapter_form
from loraplex.lora.image import AdapterWeights, unpack_image
from loraplex.lora.loader import load_adapter
from loraplex.lora.spec import AdapterError

SPEC = llama_spec()
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
Q0_A, Q0_B = f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"
PAGE_BYTES = 8 * 1024
Q = 0  # module ids
DOWN = 6


def read(path, spec, dtype) -> AdapterWeights:
    """The adapter as the kernels get it."""
    return unpack_image(load_adapter(path, spec, PAGE_BYTES, dtype), spec)


def refusal(path, spec=SPEC, dtype=torch.float32) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        load_adapter(path, spec, PAGE_BYTES, dtype)
    return caught.value


def write_with(path, changes, **options):
    """An adapter whose tensors are changed: name -> tensor, or None to leave it out."""
    tensors = adapter_tensors(SPEC, rank=4) | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return write_adapter(path, SPEC, rank=4, tensors=kept, **options)


@pytest.mark.parametrize("file_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_scaling_are_rounded_once(tmp_path, file_dtype, dtype):
    path = write_adapter(tmp_path, SPEC, rank=12, alpha=7, dtype=file_dtype, seed=1)
    tensors = load_file(path / "adapter_model.safetensors")
    weights = read(path, SPEC, dtype)
    assert len(weights.a) == len(weights.b) == SPEC.num_layers * SPEC.num_modules
    assert set(weights.ranks.values()) == {12}
    for (layer, module_id), a in weights.a.items():
        prefix = f"base_model.model.{SPEC.module_path(layer, module_id)}"
        expected_a = tensors[f"{prefix}.lora_A.weight"].to(dtype)
        expected_b = (tensors[f"{prefix}.lora_B.weight"].float() * (7 / 12)).to(dtype)
        assert a.dtype == weights.b[layer, module_id].dtype == dtype
        assert torch.equal(a, expected_a)
        assert torch.equal(weights.b[layer, module_id], expected_b)


def test_large_tensors(tmp_path):
    spec = llama_spec(num_layers=1, hidden=512)
    path = write_adapter(tmp_path, spec, rank=256, alpha=512, modules=["q_proj"])
    tensors = load_file(path / "adapter_model.safetensors")
    weights = read(path, spec, torch.float32)
    assert torch.equal(weights.a[0, Q], tensors[Q0_A])
    assert torch.equal(weights.b[0, Q], tensors[Q0_B] * 2)


def test_modules_layers_and_patterns_decide_what_is_there(tmp_path):
    path = write_adapter(
        tmp_path,
        SPEC,
        rank=4,
        alpha=4,
        modules=["q_proj", "down_proj"],
        layers=[1],
        rank_pattern={"down_proj": 9},
        alpha_pattern={"q_proj": 8},
    )
    weights = read(path, SPEC, torch.float32)
    assert weights.ranks == {(1, Q): 4, (1, DOWN): 9}
    tensors = load_file(path / "adapter_model.safetensors")
    q1 = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    assert torch.equal(weights.b[1, Q], tensors[q1] * 2)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("base_model.model.lm_head.weight", "must be named"),
        ("base_model.model.model.norm.weight", "must be named"),
        (f"{Q0}.weight", "is not allowed beside"),
        (f"{Q0}.base_layer.weight", "must be named"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "embed_tokens.lora_embedding_B'"),
        (f"{Q0}.lora_magnitude_vector", "adapter_config.json has use_dora off"),
        (f"{Q0}.lora_B.bias", "adapter_config.json has lora_bias off"),
        (f"{Q0}.base_layer.bias", "adapter_config.json has bias off"),
        (f"{Q0}.bias", "adapter_config.json has bias off"),
        ("base_model.model.model.layers.0.input_layernorm.bias", "has no partner"),
        (f"{Q0}.lora_A.default.weight", "must be named"),
        (Q0_A.removeprefix("base_model.model."), "must be named"),
        ("base_model.model.model.layers.1.self_attn.qkv_proj.lora_A.weight", "no partner"),
    ],
)
def test_an_unknown_tensor_is_refused_by_name(tmp_path, name, complaint):
    error = refusal(write_with(tmp_path, {name: torch.zeros(4, 64)}))
    assert repr(name) in str(error)
    assert complaint in str(error)
    assert error.status == 400


@pytest.mark.parametrize(("missing", "left"), [(Q0_A, Q0_B), (Q0_B, Q0_A)])
def test_half_a_pair_is_refused(tmp_path, missing, left):
    error = refusal(write_with(tmp_path, {missing: None}))
    assert str(error) == f"tensor {left!r} has no partner {missing!r}"


@pytest.mark.parametrize(
    ("changes", "name", "got", "expected"),
    [
        ({Q0_A: torch.zeros(5, 64)}, Q0_A, "[5, 64]", "[4, in_features]"),
        ({Q0_B: torch.zeros(64, 5)}, Q0_B, "[64, 5]", "[out_features, 4]"),
        ({Q0_A: torch.zeros(4)}, Q0_A, "[4]", "[4, in_features]"),
        ({Q0_A: torch.zeros(4, 64, 1)}, Q0_A, "[4, 64, 1]", "[4, in_features]"),
        ({Q0_A: torch.zeros(4, 63)}, Q0_A, "[4, 63]", "[4, 64]"),
        ({Q0_B: torch.zeros(65, 4)}, Q0_B, "[65, 4]", "[64, 4]"),
        ({Q0_B: torch.zeros(0, 4)}, Q0_B, "[0, 4]", "[64, 4]"),
    ],
)
def test_a_wrong_shape_is_refused(tmp_path, changes, name, got, expected):
    message = str(refusal(write_with(tmp_path, changes)))
    assert f"tensor {name!r} has shape {got}, expected {expected}" in message


def test_rank_in_the_config_must_be_the_tensors(tmp_path):
    message = str(refusal(write_with(tmp_path, {}, rank_pattern={"o_proj": 8})))
    assert "layers.0.self_attn.o_proj.lora_A.weight' has shape [4, 64], expected [8," in message


def test_too_many_layers(tmp_path):
    path = write_adapter(tmp_path, SPEC)
    message = str(refusal(path, replace(SPEC, num_layers=1)))
    assert "layers.1." in message
    assert "the base model has 1 layers, 0 to 0" in message


@pytest.mark.parametrize(
    "module",
    [
        "transformer.h.0.attn.c_attn",
        "lm_head",
        "model.layers.0.self_attn.query_key_value",
        "model.layers.00.self_attn.q_proj",
        f"model.layers.{'9' * 5000}.self_attn.q_proj",
        "model.layers.0.self_attn.q_proj.base_layer",
    ],
)
def test_another_architecture_is_refused_by_tensor_name(tmp_path, module):
    prefix = f"base_model.model.{module}"
    tensors = {f"{prefix}.lora_A.weight": torch.ones(4, 64)}
    tensors[f"{prefix}.lora_B.weight"] = torch.ones(64, 4)
    path = write_adapter(tmp_path, SPEC, rank=4, tensors=tensors, target_modules="all-linear")
    error = refusal(path)
    assert error.status == 400
    assert f"tensor '{prefix}.lora_A.weight' is for" in str(error)
    assert "LlamaForCausalLM" in str(error) or "the base model has 2 layers" in str(error)


def test_a_tensor_that_the_config_does_not_target_is_refused(tmp_path):
    message = str(refusal(write_with(tmp_path, {}, target_modules=["k_proj"])))
    assert "target_modules" in message
    assert "lora_A.weight" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [Q0_A, Q0_B])
def test_values_that_are_not_finite_are_refused(tmp_path, name, value):
    bad = torch.zeros(4, 64) if name == Q0_A else torch.zeros(64, 4)
    bad.view(-1)[17] = value
    assert f"tensor {name!r}" in str(refusal(write_with(tmp_path, {name: bad})))


def test_values_that_the_scaling_makes_infinite_are_refused(tmp_path):
    path = write_with(tmp_path, {Q0_B: torch.full((64, 4), 3e38)}, alpha_pattern={"q_proj": 8})
    message = str(refusal(path, dtype=torch.bfloat16))
    assert f"tensor {Q0_B!r}" in message
    assert "scaling 2" in message


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
def test_other_dtypes_are_refused(tmp_path, dtype):
    message = str(refusal(write_with(tmp_path, {Q0_A: torch.zeros(4, 64, dtype=dtype)})))
    assert f"tensor {Q0_A!r} has dtype" in message
    assert "F32, F16, BF16" in message


def test_no_tensor_at_all(tmp_path):
    assert "holds no tensor" in str(refusal(write_adapter(tmp_path, SPEC, tensors={})))


@pytest.mark.parametrize("num_bytes", [0, 5, 50, 3000, -1])
def test_a_truncated_file(tmp_path, num_bytes):
    path = write_adapter(tmp_path, SPEC)
    file = path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:num_bytes])
    assert "truncated or not a safetensors file" in str(refusal(path))


def test_missing_weights(tmp_path):
    path = write_adapter(tmp_path, SPEC)
    os.rename(path / "adapter_model.safetensors", path / "elsewhere")
    assert str(refusal(path)).startswith("adapter_model.safetensors is missing in adapter path")
    (path / "adapter_model.bin").write_bytes(b"")
    assert "adapter_model.bin is there, but pickled weights are not read" in str(refusal(path))


def test_missing_directory(tmp_path):
    assert refusal(tmp_path / "nowhere").status == 404


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = write_adapter(tmp_path, SPEC)
    original = adapter_form.read_targeted_modules

    def change_and_read(file, config):
        os.utime(path / "adapter_model.safetensors", ns=(1, 1))
        return original(file, config)

    monkeypatch.setattr(adapter_form, "read_targeted_modules", change_and_read)
    assert "changed while they were being read" in str(refusal(path))


def test_base_model_name_need_not_match(tmp_path):
    path = write_adapter(tmp_path, SPEC, base_model_name_or_path="somebody/else")
    load_adapter(path, SPEC, PAGE_BYTES, torch.float32)
