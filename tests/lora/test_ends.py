"""An adapter's part in the embedding and the head: read through pages, or refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from loraplex.benchmarks.synthetic_adapters import llama_spec, write_adapter
from loraplex.lora.ends import EndBatch
from loraplex.lora.image import AdapterWeights, EndWeights, pack_image
from loraplex.lora.loader import load_adapter
from loraplex.lora.merge import merge_adapters
from loraplex.lora.recipe import Merge
from loraplex.lora.spec import AdapterError, LoRAModule

VOCAB_SIZE, HIDDEN = 77, 70
EMBEDDING = torch.randn(VOCAB_SIZE, HIDDEN, generator=torch.Generator().manual_seed(0))
HEAD = torch.randn(VOCAB_SIZE, HIDDEN, generator=torch.Generator().manual_seed(1))


class Linears:
    """The base model's."""

    def is_embedding(self, matrix) -> bool:
        return torch.equal(matrix, EMBEDDING)

    def is_head(self, matrix) -> bool:
        return torch.equal(matrix, HEAD)


SPEC = replace(
    llama_spec(hidden=HIDDEN),
    embedding=LoRAModule("model.embed_tokens", "model.embed_tokens", VOCAB_SIZE, HIDDEN),
    head=LoRAModule("lm_head", "lm_head", HIDDEN, VOCAB_SIZE),
    linears=Linears(),
)


def random_end(seed: int, rank: int, in_features: int, out_features: int) -> EndWeights:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, in_features, generator=generator)
    b = torch.randn(out_features, rank, generator=generator)
    return EndWeights(a, b, scaling=0.25)


def random_matrix(seed: int, num_tokens: int = VOCAB_SIZE) -> EndWeights:
    generator = torch.Generator().manual_seed(seed)
    return EndWeights(torch.randn(num_tokens, HIDDEN, generator=generator), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tail", [0, 500])
def test_rows_get_their_own_adapters_embedding_and_head(dtype, tail):
    page_bytes = 3 * 512 * dtype.itemsize + tail
    q = {(1, 0): torch.randn(9, HIDDEN)}, {(1, 0): torch.randn(HIDDEN, 9)}
    adapters = [
        AdapterWeights({}, {}, dtype, head=random_end(2, 11, HIDDEN, VOCAB_SIZE)),
        AdapterWeights(*q, dtype),
        AdapterWeights(*q, dtype, embedding=random_end(3, 3, VOCAB_SIZE, HIDDEN)),
        AdapterWeights(*q, dtype, embedding=random_matrix(4, 76), head=random_matrix(5, 70)),
    ]
    images = [pack_image(weights, SPEC, page_bytes) for weights in adapters]
    assert [image.traits.has_ends for image in images] == [True, False, True, True]
    order = torch.randperm(sum(i.num_pages for i in images)) + 1
    pool = torch.randint(0, 255, (len(order) + 1, page_bytes), dtype=torch.uint8)
    page_tables = np.zeros((4, max(image.num_pages for image in images)), np.int32)
    begin = 0
    for i, image in enumerate(images):
        pages = order[begin : begin + image.num_pages]
        pool[pages] = image.pages
        page_tables[i, : image.num_pages] = pages
        begin += image.num_pages
    indptr = np.array([0, 2, 3, 6, 9], np.int32)
    traits = [image.traits for image in images]
    batch = EndBatch(pool, dtype, SPEC, indptr, page_tables, traits)

    token_ids = torch.tensor([0, 76, 5, 64, 63, 8, 7, 75, 76, 5, 6], dtype=torch.int32)
    x = F.embedding(token_ids, EMBEDDING.to(dtype))
    expected = x.clone()
    end = adapters[2].embedding
    a, b = end.a.to(dtype).float(), (end.b * end.scaling).to(dtype).float()
    expected[3:6] = (x[3:6].float() + F.embedding(token_ids[3:6], a.T) @ b.T).to(dtype)
    # Token 76 is beyond the adapter's own.
    expected[6:8] = F.embedding(token_ids[6:8], adapters[3].embedding.a.to(dtype))
    batch.look_up(x, token_ids)
    torch.testing.assert_close(x, expected)

    rows = np.array([1, 2, 5, 7, 8, 10])
    hidden = torch.randn(6, HIDDEN).to(dtype)
    y = F.linear(hidden, HEAD.to(dtype))
    expected = y.clone()
    end = adapters[0].head
    a, b = end.a.to(dtype).float(), (end.b * end.scaling).to(dtype).float()
    expected[0] += (hidden[0].float() @ a.T @ b.T).to(dtype)
    expected[3:5, :70] = F.linear(hidden[3:5], adapters[3].head.a.to(dtype))
    expected[3:5, 70:] = -torch.inf
    y = batch.head_of(rows).change(y, hidden)
    torch.testing.assert_close(y, expected)
    assert batch.head_of(np.array([2, 4, 10])) is None


HEAD_LORA = {
    "base_model.model.lm_head.lora_A.weight": torch.ones(4, HIDDEN),
    "base_model.model.lm_head.lora_B.weight": torch.ones(VOCAB_SIZE, 4),
}
EMBEDDING_LORA = {
    "base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, VOCAB_SIZE),
    "base_model.model.model.embed_tokens.lora_embedding_B": torch.ones(HIDDEN, 4),
}
TOKENS = "base_model.model.model.embed_tokens.token_adapter"
SAVED = {"base_model.model.lm_head.weight": HEAD}


def write(path, tensors, **config) -> str:
    config = {"target_modules": ["q_proj", "lm_head", "embed_tokens"], **config}
    write_adapter(path, SPEC, rank=4, modules=["q_proj"], **config)
    tensors = load_file(path / "adapter_model.safetensors") | tensors
    save_file(tensors, path / "adapter_model.safetensors")
    return str(path)


def test_copies_of_the_base_model_are_taken_for_what_they_are(tmp_path):
    copies = {
        "base_model.model.lm_head.base_layer.weight": HEAD,
        "base_model.model.model.embed_tokens.base_layer.weight": EMBEDDING,
    }
    path = write(tmp_path, HEAD_LORA | EMBEDDING_LORA | copies)
    traits = load_adapter(path, SPEC, 8192, torch.float32).traits
    assert traits.head.rank == traits.embedding.rank == 4


@pytest.mark.parametrize(
    ("tensors", "config", "complaint"),
    [
        (
            {"base_model.model.lm_head.weight": torch.ones(VOCAB_SIZE + 2, HIDDEN)},
            {},
            "'base_model.model.lm_head.weight' is of a matrix [79, 70], expected [77, 70]: lm_head "
            "of the base model is for 77 tokens; an adapter with added tokens",
        ),
        (
            {"base_model.model.model.embed_tokens.weight": torch.ones(HIDDEN, VOCAB_SIZE)},
            {},
            "embed_tokens.weight' is of a matrix [70, 77], expected [77, 70]",
        ),
        (
            EMBEDDING_LORA | {
                "base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 90)
            },
            {},
            "lora_embedding_B' is of a matrix [70, 90], expected [70, 77]",
        ),
        (
            HEAD_LORA | {"base_model.model.lm_head.base_layer.weight": HEAD + 0.1},
            {},
            "'base_model.model.lm_head.base_layer.weight' of shape [77, 70] is not the base",
        ),
        (
            HEAD_LORA | {"base_model.model.lm_head.lora_B.bias": torch.ones(VOCAB_SIZE)},
            {"lora_bias": True},
            "magnitudes and biases of lm_head are not served",
        ),
        (SAVED, {"alora_invocation_tokens": [1]}, "not allowed beside alora_invocation_tokens"),
        (
            {f"{TOKENS}.trainable_tokens_delta": torch.ones(2, HIDDEN)},
            {"trainable_token_indices": [1, 2, 3]},
            "trainable_tokens_delta' has shape [2, 70], expected [3, 70]",
        ),
        (
            {f"{TOKENS}.trainable_tokens_delta": torch.ones(2, HIDDEN)},
            {"trainable_token_indices": [1, VOCAB_SIZE]},
            "trainable_token_indices=[1, 77] is not allowed: they must be distinct, and below 77",
        ),
        (HEAD_LORA | SAVED, {}, "'base_model.model.lm_head.weight' is not allowed beside"),
        (
            {"base_model.model.lm_head.weight": torch.full((VOCAB_SIZE, HIDDEN), torch.nan)},
            {},
            "tensor of the head is not allowed: it holds infinite or NaN values",
        ),
    ],
    ids=range(10),
)  # fmt: skip
def test_what_is_not_served_is_refused_by_name(tmp_path, tensors, config, complaint):
    path = write(tmp_path, tensors, **config)
    if "lora_bias" in config:
        q_proj = "base_model.model.model.layers.{}.self_attn.q_proj.lora_B.bias"
        write(tmp_path, tensors | {q_proj.format(i): torch.ones(HIDDEN) for i in (0, 1)}, **config)
    with pytest.raises(AdapterError) as caught:
        load_adapter(path, replace(SPEC, linears=Biasless()), 8192, torch.float32)
    assert complaint in str(caught.value)


GROWN = {
    "base_model.model.lm_head.weight": torch.ones(VOCAB_SIZE + 2, HIDDEN),
    "base_model.model.model.embed_tokens.weight": torch.ones(VOCAB_SIZE + 2, HIDDEN),
}


def test_added_tokens_are_read_and_written_or_refused(tmp_path):
    spec = replace(SPEC, serves_added_tokens=True)
    path = write(tmp_path, GROWN)
    assert load_adapter(path, spec, 8192, torch.float32).traits.num_added_tokens == 2
    with pytest.raises(AdapterError, match="served on the CPU only, and without LoRA"):
        load_adapter(path, SPEC, 8192, torch.float32)
    for name, tensor in GROWN.items():
        path = write(tmp_path, {name: tensor})
        with pytest.raises(AdapterError, match="must have both matrices, of as many rows"):
            load_adapter(path, spec, 8192, torch.float32)


class Biasless(Linears):
    def bias(self, layer, module_id) -> torch.Tensor:
        return torch.zeros(HIDDEN)


def test_only_scales_are_merged():
    lora = AdapterWeights({}, {}, torch.float32, head=random_end(0, 3, HIDDEN, VOCAB_SIZE))
    saved = AdapterWeights({}, {}, torch.float32, head=random_matrix(0))
    scaled = merge_adapters([lora], Merge((0.5,)), SPEC, torch.float32)
    assert scaled.head.scaling == lora.head.scaling / 2
    with pytest.raises(AdapterError, match=r"scale=0\.5 is not allowed for an adapter that repl"):
        merge_adapters([saved], Merge((0.5,)), SPEC, torch.float32)
    with pytest.raises(AdapterError, match="with a part in the embedding or the head"):
        merge_adapters([lora, saved], Merge((0.5, 1.0)), SPEC, torch.float32)
