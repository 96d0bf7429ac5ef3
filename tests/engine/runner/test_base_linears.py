"""Weights read back by multiplying are those of the checkpoint, plain and packed."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from tiny_model import HIDDEN, VOCAB_SIZE, write_tiny_model

from loraplex.engine.config import EngineConfig
from loraplex.engine.models.config import read_model_config
from loraplex.engine.models.registry import base_model_spec, build_model
from loraplex.engine.runner.base_linears import ModelLinears
from loraplex.engine.runner.model_runner import wrap_linears


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.01)], ids=str
)
@pytest.mark.parametrize("is_tied", [False, True])
def test_weights_are_the_checkpoints(tmp_path, dtype, tolerance, is_tied):
    write_tiny_model(tmp_path, attention_bias=True, tie_word_embeddings=is_tied)
    hf_config = read_model_config(tmp_path)
    model = build_model(EngineConfig(), tmp_path, hf_config, dtype, 64, torch.device("cpu"))
    spec = base_model_spec(hf_config)
    linears = ModelLinears(wrap_linears(model, spec), model.embedding, model.lm_head)
    tensors = load_file(tmp_path / "model.safetensors")

    def assert_close(ours, theirs) -> None:
        assert ours.dtype == torch.float32
        assert ours.shape == theirs.shape
        assert (ours - theirs).norm() <= tolerance * theirs.norm()

    for layer, module_id in ((0, 0), (1, 1), (2, 2), (1, 5), (2, 6)):
        name = f"model.layers.{layer}.{spec.modules[module_id].path}"
        weight = tensors[f"{name}.weight"]
        x = torch.randn(5, weight.shape[1])
        assert_close(linears.multiply(layer, module_id, x), x @ weight.T)
        assert_close(linears.squared_norms(layer, module_id), weight.square().sum(1))
        bias = tensors.get(f"{name}.bias", torch.zeros(weight.shape[0]))
        assert_close(linears.bias(layer, module_id), bias)

    embedding = tensors["model.embed_tokens.weight"]
    head = tensors.get("lm_head.weight", embedding)
    token_ids = [3, VOCAB_SIZE - 1, 0]
    assert_close(linears.embedding_rows(token_ids), embedding[token_ids])
    assert_close(linears.head_rows(token_ids), head[token_ids])
    assert linears.is_embedding(embedding.to(torch.bfloat16))
    assert linears.is_head(head)
    for other in (embedding[:-1], embedding * 1.02, torch.randn(VOCAB_SIZE, HIDDEN)):
        assert not linears.is_embedding(other)
    for other in (head[:-1], head * 1.02, torch.randn(VOCAB_SIZE, HIDDEN)):
        assert not linears.is_head(other)
