"""Tiny random checkpoints of the Llama architecture, against transformers in float32."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from attention_shapes import make_shape
from safetensors.torch import load_file, save_file
from transformers import BloomConfig, LlamaConfig
from transformers import LlamaForCausalLM as Reference

from loraplex.attention.backend import get_backend
from loraplex.attention.metadata import AttentionMetadata
from loraplex.benchmarks.synthetic_model import QUANTISED
from loraplex.engine.config import EngineConfig
from loraplex.engine.models.config import (
    head_dim,
    max_positions,
    read_model_config,
    resolve_dtype,
)
from loraplex.engine.models.registry import base_model_spec, build_model, kv_block_shape
from loraplex.engine.runner.model_runner import DeviceBatch

BLOCK_SIZE = 4
SHAPES = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "one kv head, odd head_dim": {"num_key_value_heads": 1, "head_dim": 24},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "linear rope": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    },
    "llama3 rope": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
        }
    },
    "yarn rope": {
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
}  # fmt: skip


def write_model(path: Path, max_shard_size: str = "5GB", **shape) -> Reference:
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": 101,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "initializer_range": 0.2,
            **shape,
        }
    )
    model = Reference(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return model


def load(path: Path):
    hf_config = read_model_config(path)
    dtype = resolve_dtype("auto", hf_config)
    return build_model(EngineConfig(), path, hf_config, dtype, 128, torch.device("cpu")), hf_config


@torch.inference_mode()
def forward_in_chunks(model, hf_config, token_ids: torch.Tensor) -> torch.Tensor:
    """Logits of one sequence, computed in three chunks over shuffled pages."""
    pool = torch.full((40, *kv_block_shape(hf_config, BLOCK_SIZE)), float("nan"))
    caches = [(pool[:, i, 0], pool[:, i, 1]) for i in range(pool.shape[1])]
    table = torch.randperm(39)[: -(-len(token_ids) // BLOCK_SIZE)].int() + 1
    backend = get_backend("native", make_shape(head_dim(hf_config) ** -0.5, BLOCK_SIZE))
    hidden = []
    for start, end in ((0, 17), (17, 18), (18, len(token_ids))):
        positions = torch.arange(start, end)
        metadata = AttentionMetadata(
            cu_seqlens_q=torch.tensor([0, end - start], dtype=torch.int32),
            seq_lens=torch.tensor([end], dtype=torch.int32),
            block_table=table[None],
            slot_mapping=table[positions // BLOCK_SIZE].long() * BLOCK_SIZE
            + positions % BLOCK_SIZE,
            max_query_len=end - start,
        )
        batch = DeviceBatch(attention=backend.plan(metadata), kv_caches=caches, lora=None)
        hidden.append(model.forward(token_ids[start:end].int(), positions, batch))
    return model.logits(torch.cat(hidden))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_logits_equal_transformers(shape, tmp_path):
    reference = write_model(tmp_path, max_shard_size="40KB", **shape)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1, "the checkpoint has several shards"
    token_ids = torch.randint(0, 101, (60,))
    logits = forward_in_chunks(*load(tmp_path), token_ids)
    with torch.inference_mode():
        expected = reference(token_ids[None]).logits[0]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def change_config(path: Path, **fields) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | fields))


def change_tensors(path: Path, change) -> None:
    """Rewrite the one shard of a model."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def one_shard(tmp_path: Path) -> Path:
    write_model(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "lacks tensors of the model: model.norm.weight"),
        (lambda t: t.update(extra=torch.zeros(1)), "tensors that the model lacks: extra"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(47)}),
            r"'model.norm.weight' of the checkpoint has shape \(47,\).*wants \(48,\)",
        ),
    ],
    ids=["missing", "leftover", "shape"],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(one_shard, change, message):
    change_tensors(one_shard, change)
    with pytest.raises(ValueError, match=message):
        load(one_shard)


def test_unreadable_checkpoints_are_refused(one_shard):
    file = one_shard / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="can't be read as safetensors"):
        load(one_shard)
    file.unlink()
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        load(one_shard)
    (one_shard / "config.json").unlink()
    with pytest.raises(ValueError, match="no config.json"):
        load(one_shard)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_act", "tanh", "hidden_act='tanh' .* one of gelu"),
        ("architectures", ["LlamaModel"], "LlamaModel.*is a LlamaForCausalLM"),
        ("rope_parameters", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, "dynamic"),
        ("partial_rotary_factor", 0.5, "partial_rotary_factor=0.5 .* LlamaForCausalLM"),
        ("tie_word_embeddings", True, "'lm_head.weight' .* differs .* tie_word_embeddings=true"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(one_shard, field, value, message):
    change_config(one_shard, **{field: value})
    with pytest.raises(ValueError, match=message):
        load(one_shard)


def test_fields_that_mean_nothing_to_an_architecture_change_nothing(one_shard):
    change_config(one_shard, sliding_window=5, layer_types=["sliding_attention"] * 3)
    model, _ = load(one_shard)
    assert model.windows == (None,)


def test_yarn_serves_more_positions_than_the_model_was_trained_for(one_shard):
    hf_config = read_model_config(one_shard)
    assert max_positions(hf_config) == 128
    hf_config.rope_parameters |= SHAPES["yarn rope"]["rope_parameters"]
    assert max_positions(hf_config) == 128
    hf_config.rope_parameters["original_max_position_embeddings"] = 128
    assert max_positions(hf_config) == 512
    bloom = BloomConfig(architectures=["BloomForCausalLM"])
    with pytest.raises(ValueError, match="BloomForCausalLM.*no max_position_embeddings.*ALiBi"):
        max_positions(bloom)


def test_the_dtype_is_that_of_the_checkpoint_if_it_says_one():
    dtypes = [
        resolve_dtype("auto", LlamaConfig(dtype=dtype)) for dtype in (None, "float16", "bfloat16")
    ]
    assert dtypes == [torch.float32, torch.bfloat16, torch.bfloat16]


def test_what_adapters_may_target(one_shard):
    spec = base_model_spec(read_model_config(one_shard))
    shapes = {m.path: (m.in_features, m.out_features) for m in spec.modules}
    assert shapes == {
        "self_attn.q_proj": (48, 48),
        "self_attn.k_proj": (48, 24),
        "self_attn.v_proj": (48, 24),
        "self_attn.o_proj": (48, 48),
        "mlp.gate_proj": (48, 80),
        "mlp.up_proj": (48, 80),
        "mlp.down_proj": (80, 48),
    }


@pytest.mark.parametrize("method", [None, "awq", "gptq"])
def test_dummy_weights_need_no_checkpoint(one_shard, method):
    (one_shard / "model.safetensors").unlink()
    hf_config = read_model_config(one_shard)
    if method is not None:
        hf_config.quantization_config = QUANTISED[method] | {"group_size": 8}
    model = build_model(
        EngineConfig(load_format="dummy"),
        one_shard,
        hf_config,
        torch.float32,
        128,
        torch.device("cpu"),
    )
    logits = forward_in_chunks(model, hf_config, torch.arange(40))
    assert logits.isfinite().all()
    assert logits.std() > 0
