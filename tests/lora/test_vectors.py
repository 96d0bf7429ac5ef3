"""Gains and offsets of a step, read through page tables, against their definition."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex.benchmarks.synthetic_adapters import llama_spec, write_adapter
from loraplex.lora import vectors
from loraplex.lora.image import AdapterWeights, pack_image
from loraplex.lora.layers import LinearWithLoRA
from loraplex.lora.loader import load_adapter
from loraplex.lora.merge import merge_adapters
from loraplex.lora.recipe import Merge
from loraplex.lora.spec import AdapterError
from loraplex.lora.vectors import VectorBatch

SPEC = llama_spec()
QKV = LinearWithLoRA(None, layer=1, modules=[0, 1, 2], out_features=[64, 32, 32])
DOWN = LinearWithLoRA(None, layer=0, modules=[6], out_features=[64])


class RecordingBatch:
    """The plain adapters: notes what it is given, and adds 1."""

    def add(self, y, x, linear, routing: object = None) -> None:
        self.seen = y.clone()
        y += 1


def weights_with(places, dtype, seed) -> AdapterWeights:
    generator = torch.Generator().manual_seed(seed)
    weights = AdapterWeights({}, {}, dtype)
    for place in [(0, 6), (1, 0), (1, 1), (1, 2)]:
        module = SPEC.modules[place[1]]
        weights.a[place] = torch.randn(9, module.in_features, generator=generator)
        weights.b[place] = torch.randn(module.out_features, 9, generator=generator)
        if place in places:
            gain_and_offset = torch.randn(2, module.out_features, generator=generator)
            weights.gains[place], weights.offsets[place] = gain_and_offset
    return weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tail", [0, 500])
@pytest.mark.parametrize("chunk_rows", [3, 256])
def test_rows_get_their_own_adapters_gain_and_offset(dtype, tail, chunk_rows, monkeypatch):
    monkeypatch.setattr(vectors, "CHUNK_ROWS", chunk_rows)
    page_bytes = 3 * 512 * dtype.itemsize + tail
    adapters = [
        weights_with([], dtype, 0),
        weights_with([(1, 0), (1, 2)], dtype, 1),
        weights_with([], dtype, 2),
        weights_with([(0, 6), (1, 1), (1, 2)], dtype, 3),
    ]
    images = [pack_image(weights, SPEC, page_bytes) for weights in adapters]
    most_pages = max(image.num_pages for image in images)
    order = torch.randperm(sum(i.num_pages for i in images)) + 1
    pool = torch.randint(0, 255, (len(order) + 1, page_bytes), dtype=torch.uint8)
    page_tables = np.zeros((4, most_pages), np.int32)
    begin = 0
    for i, image in enumerate(images):
        pages = order[begin : begin + image.num_pages]
        pool[pages] = image.pages
        page_tables[i, : image.num_pages] = pages
        begin += image.num_pages
    indptr = np.array([0, 2, 3, 5, 9], np.int32)
    traits = [image.traits for image in images]
    assert [t.vector_mask for t in traits] == [0, 0b101, 0, 0b1000110]
    plain = RecordingBatch()
    batch = VectorBatch(plain, pool, dtype.itemsize, SPEC, indptr, page_tables, traits)
    for linear in (QKV, DOWN):
        y = torch.randn(11, linear.offsets[-1]).to(dtype)
        expected = y.clone()
        for segment, weights in enumerate(adapters):
            rows = slice(indptr[segment], indptr[segment + 1])
            for i, module in enumerate(linear.modules):
                gain = weights.gains.get((linear.layer, module))
                if gain is not None:
                    columns = slice(*linear.offsets[i : i + 2])
                    offset = weights.offsets[linear.layer, module]
                    scaled = expected[rows, columns].float() * (1 + gain) + offset
                    expected[rows, columns] = scaled.to(dtype)
        batch.add(y, torch.zeros(11, 1), linear)
        torch.testing.assert_close(plain.seen, expected)
        assert torch.equal(y, plain.seen + 1)


def write_dora(path, changes=()) -> None:
    write_adapter(path, SPEC, rank=4, modules=["q_proj"], use_dora=True)
    tensors = load_file(path / "adapter_model.safetensors")
    for layer in range(SPEC.num_layers):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_magnitude_vector"
        tensors[name] = torch.ones(64)
    tensors.update(changes)
    save_file(tensors, path / "adapter_model.safetensors")


def refusal(path) -> str:
    with pytest.raises(AdapterError) as caught:
        load_adapter(str(path), SPEC, 8192, torch.float32)
    return str(caught.value)


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    write_dora(tmp_path)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_magnitude_vector"
    assert "depends on the base model's weights, which are not here" in refusal(tmp_path)
    write_dora(tmp_path, {name: torch.ones(65)})
    assert f"tensor '{name}' has shape [65], expected [64]" in refusal(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    del tensors[name]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert f"tensor '{name}' is missing" in refusal(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": False}))
    assert "lora_magnitude_vector' is not allowed: adapter_config.json has use_dora off" in refusal(
        tmp_path
    )


def test_values_that_are_not_finite_are_refused():
    weights = weights_with([(1, 0)], torch.float32, 0)
    weights.gains[1, 0][3] = torch.inf
    with pytest.raises(AdapterError, match=r"a bias of model\.layers\.1\.self_attn\.q_proj"):
        pack_image(weights, SPEC, 8192)


def test_only_scales_are_merged():
    adapters = [weights_with([(1, 0)], torch.float32, i) for i in range(2)]
    with pytest.raises(AdapterError, match="merged_adapters of adapters with DoRA"):
        merge_adapters(adapters, Merge((1.0, 1.0)), SPEC, torch.float32)
    scaled = merge_adapters(adapters[:1], Merge((0.5,)), SPEC, torch.float32)
    assert torch.equal(scaled.gains[1, 0], adapters[0].gains[1, 0] / 2)
    assert torch.equal(scaled.offsets[1, 0], adapters[0].offsets[1, 0] / 2)
    assert scaled.scalings[1, 0] == 0.5
