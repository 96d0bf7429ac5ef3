"""Whatever tensors of whatever shapes an adapter has: it is served or refused, and nothing else."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from loraplex.benchmarks.synthetic_adapters import llama_spec, write_adapter
from loraplex.lora.inspect import inspect_adapter
from loraplex.lora.spec import LoRAModule

VOCAB_SIZE, HIDDEN = 40, 64
SPLIT = replace(
    llama_spec(num_layers=1),
    embedding=LoRAModule("model.embed_tokens", "model.embed_tokens", VOCAB_SIZE, HIDDEN),
    head=LoRAModule("lm_head", "lm_head", HIDDEN, VOCAB_SIZE),
    is_tied=True,
)
FUSED = replace(
    SPLIT,
    modules=(
        LoRAModule("qkv_proj", "self_attn.qkv_proj", HIDDEN, 128),
        LoRAModule("gate_up_proj", "mlp.gate_up_proj", HIDDEN, 192),
    ),
)
MODULES = [
    *(f"model.layers.0.self_attn.{name}_proj" for name in ("q", "k", "qkv")),
    *(f"model.layers.0.mlp.{name}_proj" for name in ("gate_up", "up")),
    "model.embed_tokens",
    "lm_head",
]
KINDS = [
    "lora_A.weight",
    "lora_B.weight",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
    "lora_B.bias",
    "base_layer.bias",
    "base_layer.weight",
    "weight",
    "token_adapter.trainable_tokens_delta",
]
SIZES = st.sampled_from([0, 1, 2, 3, 4, 32, VOCAB_SIZE, HIDDEN, 96, 128, 192])
# Of what fits, so that more than the first check is met.
PAIR = {"lora_A.weight": (4, HIDDEN), "lora_B.weight": (HIDDEN, 4)}


@st.composite
def adapters(draw):
    tensors = {}
    if draw(st.booleans()):
        for kind, shape in PAIR.items():
            tensors[f"base_model.model.model.layers.0.self_attn.q_proj.{kind}"] = shape
    for _ in range(draw(st.integers(0, 4))):
        name = f"base_model.model.{draw(st.sampled_from(MODULES))}.{draw(st.sampled_from(KINDS))}"
        tensors[name] = tuple(draw(st.lists(SIZES, max_size=3)))
    config = {
        "use_dora": draw(st.booleans()),
        "lora_bias": draw(st.booleans()),
        "bias": draw(st.sampled_from(["none", "lora_only", "all"])),
        "alora_invocation_tokens": draw(st.sampled_from([None, [1]])),
        "trainable_token_indices": draw(
            st.sampled_from([None, [0, 1], [39, 40], [2, 2], {"lm_head": [1]}])
        ),
    }
    return draw(st.sampled_from([SPLIT, FUSED])), tensors, config


@settings(deadline=None, max_examples=120)
@given(adapters())
@example((SPLIT, {"base_model.model.lm_head.weight": (0, HIDDEN)}, {}))
@example((SPLIT, {"base_model.model.lm_head.weight": (VOCAB_SIZE, HIDDEN)}, {}))
@example((FUSED, {f"base_model.model.{MODULES[0]}.{k}": s for k, s in PAIR.items()}, {}))
def test_an_adapter_is_served_or_refused(case):
    spec, shapes, config = case
    with tempfile.TemporaryDirectory() as directory:
        tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
        path = write_adapter(
            Path(directory), spec, rank=4, tensors=tensors, target_modules=r".*", **config
        )
        report = inspect_adapter(str(path), (spec, 16 * 1024))
    assert report.render()
    if report.refusal is not None:
        named = "base_model.model.", "adapter_config.json", "holds no tensor", "mlp.", "self_attn."
        assert any(name in report.refusal for name in named), report.refusal
    else:
        assert report.num_pages
        read = {name for module in report.modules for name in module.tensors.values()}
        assert read == tensors.keys(), "no tensor is left out"
