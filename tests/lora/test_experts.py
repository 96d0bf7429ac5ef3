"""LoRA on the linears of experts: rows of a step, kernels, and what adapters may have."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from loraplex.lora import ops, reference
from loraplex.lora.experts import expert_segments
from loraplex.lora.image import AdapterWeights, pack_image, unpack_image
from loraplex.lora.loader import load_adapter, read_adapter
from loraplex.lora.recipe import Merge, MergeRecipe
from loraplex.lora.spec import AdapterError, BaseModelSpec, LoRAModule

NUM_EXPERTS, HIDDEN, SIZE = 3, 70, 40
SPEC = BaseModelSpec(
    "AnyMoe",
    num_layers=2,
    modules=(
        LoRAModule("q_proj", "self_attn.q_proj", HIDDEN, HIDDEN),
        LoRAModule("gate_up_proj", "mlp.experts.gate_up_proj", HIDDEN, 2 * SIZE, NUM_EXPERTS),
        LoRAModule("down_proj", "mlp.experts.down_proj", SIZE, HIDDEN, NUM_EXPERTS, frozenset({1})),
    ),
    renamed_parts={".moe.": ".mlp.", ".w2.": ".down_proj."},
)
DTYPES = [torch.float32, torch.bfloat16]


@dataclass
class Rows:
    """See loraplex.lora.experts.Routing."""

    ends: torch.Tensor
    tokens: torch.Tensor


def route(chosen: torch.Tensor, num_experts: int) -> Rows:
    """chosen [num_tokens, experts of a token]"""
    order = chosen.flatten().argsort(stable=True)
    ends = chosen.flatten().bincount(minlength=num_experts).cumsum(0).int()
    return Rows(ends, order // chosen.shape[1])


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_segments_are_found_among_the_rows_of_each_expert(data):
    num_experts = data.draw(st.integers(1, 5))
    sizes = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=5))
    num_tokens = sum(sizes) + data.draw(st.integers(0, 3))
    width = data.draw(st.integers(1, num_experts))
    choice = st.permutations(range(num_experts)).map(lambda order: order[:width])
    chosen = data.draw(st.lists(choice, min_size=num_tokens, max_size=num_tokens))
    routing = route(torch.tensor(chosen, dtype=torch.int64).view(-1, width), num_experts)
    indptr = torch.tensor([0, *sizes], dtype=torch.int32).cumsum(0).int()

    segments = expert_segments(indptr, routing)
    begin = 0
    for expert, end in enumerate(routing.ends.tolist()):
        tokens = routing.tokens[begin:end].tolist()
        bounds = zip(indptr.tolist(), indptr[1:].tolist(), strict=False)
        for segment, (first, last) in enumerate(bounds):
            low, high = segments[expert, segment : segment + 2].tolist()
            expected = [token for token in range(first, last) if expert in chosen[token]]
            assert tokens[low - begin : high - begin] == expected
        begin = end


def random_weights(ranks: dict[int, int], dtype: torch.dtype) -> AdapterWeights:
    weights = AdapterWeights({}, {}, dtype)
    for module_id, rank in ranks.items():
        module = SPEC.modules[module_id]
        weights.a[1, module_id] = torch.randn(NUM_EXPERTS, rank, module.in_features).to(dtype)
        weights.b[1, module_id] = torch.randn(NUM_EXPERTS, module.out_features, rank).to(dtype)
    return weights


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("module_id", [1, 2])
def test_kernels_equal_their_twins_and_dense_algebra(
    isa: str, dtype: torch.dtype, module_id: int, one_thread: None
):
    """Adapters with and without experts, rows without one, an expert that no row goes to."""
    torch.manual_seed(0)
    module = SPEC.modules[module_id]
    adapters = [random_weights(ranks, dtype) for ranks in ({1: 5, 2: 9}, {0: 4}, {1: 17, 2: 3})]
    adapters[1].a[1, 0], adapters[1].b[1, 0] = (m[1, 0][0] for m in (adapters[1].a, adapters[1].b))
    page_bytes = 3 * 512 * dtype.itemsize + 64
    images = [pack_image(weights, SPEC, page_bytes).pages for weights in adapters]
    pages = torch.randperm(sum(map(len, images)), dtype=torch.int32).split(list(map(len, images)))
    pool = torch.empty(sum(map(len, images)), page_bytes, dtype=torch.uint8)
    tables = torch.zeros(len(images), max(map(len, images)), dtype=torch.int32)
    for table, image, own in zip(tables, images, pages, strict=True):
        pool[own.long()] = image
        table[: len(own)] = own

    indptr = torch.tensor([0, 6, 8, 27], dtype=torch.int32)
    chosen = torch.stack([torch.randperm(2) for _ in range(30)]) * 2  # experts 0 and 2
    routing = route(chosen, NUM_EXPERTS)
    segments = expert_segments(indptr, routing)
    x = torch.randn(60, module.in_features).to(dtype)
    base = torch.randn(60, module.out_features).to(dtype)
    where = pool, segments, tables, 1, [module_id], SPEC.num_modules
    results = []
    for kernels in (ops, reference):
        v, y = torch.full((60, 1, 20), torch.nan), base.clone()
        kernels.shrink(v, x, *where)
        kernels.expand(y, v, *where, [0, module.out_features])
        results.append(y)
    expected = base.double()
    for expert in range(NUM_EXPERTS):
        for weights, low, high in zip(
            adapters, segments[expert].tolist(), segments[expert, 1:].tolist(), strict=False
        ):
            if (1, module_id) in weights.a:
                a, b = (m[1, module_id][expert].double() for m in (weights.a, weights.b))
                expected[low:high] += x[low:high].double() @ a.T @ b.T
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 2e-4}
    for y in results:
        torch.testing.assert_close(y.double(), expected, **tolerance)


def save(path: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    path.mkdir()
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, **config}
    (path / "adapter_config.json").write_text(json.dumps(values))
    prefix = "base_model.model.model.layers."
    save_file({prefix + name: tensor for name, tensor in tensors.items()},
              path / "adapter_model.safetensors")  # fmt: skip
    return path


def pair(name: str, in_features: int, out_features: int, rank: int = 2) -> dict[str, torch.Tensor]:
    return {
        f"{name}.lora_A.weight": torch.randn(rank, in_features),
        f"{name}.lora_B.weight": torch.randn(out_features, rank),
    }


def deltas(weights: AdapterWeights, layer: int, module_id: int) -> torch.Tensor:
    """[num_experts, out_features, in_features]"""
    place = layer, module_id
    return weights.scalings.get(place, 1.0) * (weights.b[place].float() @ weights.a[place].float())


def test_linears_of_each_expert_may_differ_in_rank_and_be_missing(tmp_path: Path):
    tensors = {
        **pair("0.moe.experts.0.gate_proj", HIDDEN, SIZE),
        **pair("0.moe.experts.0.up_proj", HIDDEN, SIZE, 5),
        **pair("0.moe.experts.2.up_proj", HIDDEN, SIZE, 5),
        **pair("1.moe.experts.1.w2", SIZE, HIDDEN),
    }
    path = save(tmp_path / "one", tensors, target_modules="all-linear",
                rank_pattern={"up_proj": 5})  # fmt: skip
    weights = read_adapter(str(path), SPEC, torch.float32)
    delta = {
        name.removesuffix(".lora_A.weight"): 6 / len(a)
        * tensors[name.replace("lora_A", "lora_B")] @ a
        for name, a in tensors.items() if "lora_A" in name
    }  # fmt: skip
    expected = torch.zeros(NUM_EXPERTS, 2 * SIZE, HIDDEN)
    expected[0, :SIZE] = delta["0.moe.experts.0.gate_proj"]
    expected[0, SIZE:] = delta["0.moe.experts.0.up_proj"]
    expected[2, SIZE:] = delta["0.moe.experts.2.up_proj"]
    torch.testing.assert_close(deltas(weights, 0, 1), expected)
    expected = torch.zeros(NUM_EXPERTS, HIDDEN, SIZE)
    expected[1] = delta["1.moe.experts.1.w2"]
    torch.testing.assert_close(deltas(weights, 1, 2), expected)
    assert weights.a.keys() == {(0, 1), (1, 2)}


ALL_EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def test_one_targeted_parameter_is_the_one_that_is_named(tmp_path: Path):
    tensors = pair("1.mlp.experts", SIZE, HIDDEN, 2 * NUM_EXPERTS)
    path = save(tmp_path / "one", tensors, target_parameters=ALL_EXPERTS[1:])
    assert read_adapter(str(path), SPEC, torch.float32).a.keys() == {(1, 2)}
    path = save(tmp_path / "other", tensors, target_parameters=ALL_EXPERTS[:1])
    with pytest.raises(AdapterError, match=r"has shape \[6, 40\], expected \[6, 70\]"):
        read_adapter(str(path), SPEC, torch.float32)


@pytest.mark.parametrize("strategy", ["linear", "cat"])
def test_adapters_of_experts_are_merged(strategy: str, tmp_path: Path):
    paths = [
        save(
            tmp_path / str(i),
            pair("1.mlp.experts", SIZE, HIDDEN, 2 * NUM_EXPERTS),
            target_parameters=ALL_EXPERTS[1:],
        )
        for i in range(2)
    ]
    merge = Merge((0.5, -2.0), strategy)
    image = load_adapter(MergeRecipe(tuple(map(str, paths)), merge), SPEC, 1 << 16, torch.float32)
    parts = [read_adapter(str(path), SPEC, torch.float32) for path in paths]
    merged = unpack_image(image, SPEC)
    if strategy == "cat":
        assert image.traits.max_rank == 4
        expected = sum(w * deltas(part, 1, 2) for w, part in zip(merge.weights, parts, strict=True))
    else:
        assert image.traits.max_rank == 2
        first, second = (part.a[1, 2] for part in parts)
        a = 1.5**0.5 * first - 6**0.5 * second  # weights times alpha / rank, 3
        first, second = (part.b[1, 2] for part in parts)
        expected = (1.5**0.5 * first + 6**0.5 * second) @ a
    torch.testing.assert_close(deltas(merged, 1, 2), expected)


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (pair("0.mlp.experts.3.up_proj", HIDDEN, SIZE), {}, "expert 3: the base model has 3"),
        (pair("0.mlp.experts.0.down_proj", SIZE, HIDDEN), {}, "layer 0, which has no mlp.experts"),
        (
            pair("0.mlp.experts", HIDDEN, 2 * SIZE, 4),
            {"target_parameters": ALL_EXPERTS[:1]},
            r"has shape \[4, 70\], expected \[6, 70\]",
        ),
        (
            pair("0.mlp.experts", HIDDEN, 2 * SIZE, 7),
            {"target_parameters": ALL_EXPERTS[:1]},
            r"expected \[num_experts \* 2, in_features\]",
        ),
        (
            pair("0.mlp.experts.base_layer", HIDDEN, 2 * SIZE, 6),
            {"target_parameters": ALL_EXPERTS[:1]},
            "is for a parameter that target_parameters of .* does not target: .* gate_up_proj",
        ),
        (pair("0.mlp.experts", HIDDEN, 2 * SIZE, 6), {}, "does not target: .* it has none"),
        (
            pair("0.mlp.experts", HIDDEN, 2 * SIZE, 6)
            | pair("0.mlp.experts.1.up_proj", HIDDEN, SIZE),
            {"target_parameters": ALL_EXPERTS[:1]},
            "is for outputs that .* is for, too",
        ),
        (
            pair("0.mlp.experts.0.up_proj", HIDDEN, SIZE)
            | {"0.mlp.experts.0.up_proj.lora_magnitude_vector": torch.ones(SIZE)},
            {"use_dora": True},
            "magnitudes and biases of experts are not served",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(tensors, config, message, tmp_path: Path):
    path = save(tmp_path / "one", tensors, **config)
    with pytest.raises(AdapterError, match=message):
        read_adapter(str(path), SPEC, torch.float32)


def test_where_experts_are_not_served_the_reason_is_told(tmp_path: Path):
    spec = SPEC.without_experts("not on this device")
    tensors = [
        pair("0.mlp.experts", HIDDEN, 2 * SIZE, 6),
        pair("0.mlp.experts.1.up_proj", HIDDEN, SIZE),
    ]
    for index, adapter in enumerate(tensors):
        path = save(tmp_path / str(index), adapter, target_parameters=ALL_EXPERTS[:1])
        with pytest.raises(AdapterError, match=r"'base_model.*' is not allowed: not on this devi"):
            read_adapter(str(path), spec, torch.float32)
    assert spec == replace(spec, modules=SPEC.modules[:1])
