"""Merging adapters: PEFT's add_weighted_adapter is the oracle, on adapters that PEFT made."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from loraplex.benchmarks.synthetic_adapters import llama_spec
from loraplex.lora.image import AdapterWeights, Place, pack_image, unpack_image
from loraplex.lora.merge import merge_adapters
from loraplex.lora.plan import MAX_RANK
from loraplex.lora.recipe import STRATEGIES, Merge
from loraplex.lora.spec import AdapterError

SPEC = llama_spec(num_layers=2)
PLACES = [(layer, module_id) for layer in range(2) for module_id in range(SPEC.num_modules)]
SEED = 7
CONFIGS = {
    "plain": {"r": 6, "lora_alpha": 7, "target_modules": "all-linear"},
    "rslora": {
        "r": 6,
        "lora_alpha": 2,
        "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"],
        "use_rslora": True,
    },
    # Scalings and layers of its own. (Not first: PEFT would drop the others' layers.)
    "part": {
        "r": 6,
        "lora_alpha": 12,
        "target_modules": ["k_proj", "up_proj", "down_proj"],
        "alpha_pattern": {"down_proj": -5},
        "layers_to_transform": [1],
    },
    "wide": {"r": 17, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"]},
}
WEIGHTS = [
    (["plain", "rslora"], (0.7, 0.3)),
    (["rslora", "plain"], (1.0, -0.5)),
    (["plain", "rslora", "part"], (0.5, 0.25, 0.25)),
    (["plain", "part"], (-1.5, 0.0)),
]

CASES = [
    (strategy, density, sign_method)
    for strategy in STRATEGIES
    for density in (0.3, 1.0)
    for sign_method in ("total", "frequency")
    if "ties" in strategy or sign_method == "total"
]


@pytest.fixture(scope="module")
def peft_model() -> peft.PeftModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=32,
    )
    names = list(CONFIGS)
    first = peft.LoraConfig(**CONFIGS[names[0]])
    model = peft.get_peft_model(LlamaForCausalLM(config), first, names[0])
    for name in names[1:]:
        model.add_adapter(name, peft.LoraConfig(**CONFIGS[name]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    return model


def weights_of(model: peft.PeftModel, name: str) -> AdapterWeights:
    weights = AdapterWeights({}, {}, torch.float32)
    for place in PLACES:
        module = model.get_submodule(f"base_model.model.{SPEC.module_path(*place)}")
        if name in getattr(module, "lora_A", ()):
            weights.a[place] = module.lora_A[name].weight.detach()
            weights.b[place] = module.lora_B[name].weight.detach()
            weights.scalings[place] = module.scaling[name]
    return weights


def peft_deltas(
    model: peft.PeftModel, names: Sequence[str], merge: Merge
) -> dict[Place, torch.Tensor]:
    """What PEFT merges to, but for the scaling that it leaves on the result."""
    options = {"density": merge.density, "majority_sign_method": merge.majority_sign_method}
    model.add_weighted_adapter(
        list(names), list(merge.weights), "merged", merge.strategy, **options
    )
    try:
        merged = weights_of(model, "merged")
        deltas = {}
        for place in merged.a:
            module = model.get_submodule(f"base_model.model.{SPEC.module_path(*place)}")
            delta = module.get_delta_weight("merged").detach()
            deltas[place] = delta / module.scaling["merged"]
        return deltas
    finally:
        model.delete_adapter("merged")


def deltas_of(weights: AdapterWeights) -> dict[Place, torch.Tensor]:
    return {
        place: weights.b[place] @ a * weights.scalings.get(place, 1.0)
        for place, a in weights.a.items()
    }


def assert_close(left: dict[Place, torch.Tensor], right: dict[Place, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for place, delta in left.items():
        torch.testing.assert_close(delta, right[place], rtol=1e-5, atol=2e-5, msg=str)


def adapter(ranks: dict[Place, int], seed: int = 0, dtype=torch.float32) -> AdapterWeights:
    generator = torch.Generator().manual_seed(seed)
    weights = AdapterWeights({}, {}, torch.float32)
    for place, rank in ranks.items():
        module = SPEC.modules[place[1]]
        weights.a[place] = torch.randn(rank, module.in_features, generator=generator).to(dtype)
        weights.b[place] = torch.randn(module.out_features, rank, generator=generator).to(dtype)
        weights.scalings[place] = 1.5 + seed
    return weights


def merged(adapters: Sequence[AdapterWeights], *args, dtype=torch.float32, **kwargs):
    return merge_adapters(adapters, Merge(*args, **kwargs), SPEC, dtype)


def bernoulli_of_ours(seed: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """PEFT's draws, made what merge_adapters says that it draws."""
    generator = np.random.default_rng(seed)

    def bernoulli(probabilities: torch.Tensor) -> torch.Tensor:
        numbers = torch.from_numpy(generator.random(tuple(probabilities.shape), np.float32))
        return (numbers < probabilities).to(probabilities.dtype)

    return bernoulli


@pytest.mark.parametrize("names, weights", WEIGHTS, ids=lambda value: "-".join(map(str, value)))
@pytest.mark.parametrize("strategy, density, sign_method", CASES)
@pytest.mark.filterwarnings("ignore")
def test_delta_weights_are_pefts(
    peft_model, monkeypatch, strategy, density, sign_method, names, weights
):
    merge = Merge(weights, strategy, density, sign_method, SEED)
    monkeypatch.setattr(torch, "bernoulli", bernoulli_of_ours(SEED))
    expected = peft_deltas(peft_model, names, merge)
    ours = merge_adapters([weights_of(peft_model, n) for n in names], merge, SPEC, torch.float32)
    assert_close(deltas_of(ours), expected)
    assert not ours.scalings

    packed = unpack_image(pack_image(ours, SPEC, 3 * 2048 + 64), SPEC)
    for place in expected:
        assert torch.equal(packed.a[place], ours.a[place])
        assert torch.equal(packed.b[place], ours.b[place])


@pytest.mark.filterwarnings("ignore")
def test_cat_takes_different_ranks(peft_model):
    names, merge = ["wide", "rslora", "part"], Merge((0.5, -2.0, 1.0), "cat")
    ours = merge_adapters(
        [weights_of(peft_model, name) for name in names], merge, SPEC, torch.float32
    )
    assert_close(deltas_of(ours), peft_deltas(peft_model, names, merge))
    ranks = {SPEC.modules[place[1]].name: rank for place, rank in ours.ranks.items()}
    assert ranks == {"q_proj": 23, "k_proj": 12, "v_proj": 6, "up_proj": 23, "down_proj": 12}


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s != "cat"])
@pytest.mark.filterwarnings("ignore")
def test_different_ranks_are_refused_as_peft_does(peft_model, strategy):
    # "wide" and "part" meet in up_proj of layer 1, "wide" and the last nowhere.
    apart = adapter({(0, 1): 6})
    wide, part = weights_of(peft_model, "wide"), weights_of(peft_model, "part")
    with pytest.raises(ValueError, match="must have the same r"):
        peft_deltas(peft_model, ["wide", "part"], Merge((1, 1), strategy))
    for adapters in ([wide, part], [wide, apart]):
        with pytest.raises(AdapterError, match=rf"strategy='{strategy}'.* \[17, 6\]: use 'cat'"):
            merged(adapters, (1.0, 1.0), strategy)
    # Largest ranks are equal, and two that are not the first differ in one place.
    adapters = [adapter({(0, 0): 8}), adapter({(0, 0): 8, (1, 4): 3}), adapter({(1, 4): 8})]
    with pytest.raises(AdapterError, match=r"\[3, 8\] at model\.layers\.1\.mlp\.gate_proj: use"):
        merged(adapters, (1.0, 1.0, 1.0), strategy)


def test_ranks_may_differ_from_place_to_place():
    ranks = {(0, 0): 3, (1, 6): 9}
    adapters = [adapter(ranks, seed=0), adapter(ranks, seed=1)]
    assert merged(adapters, (1.0, 2.0)).ranks == ranks


def test_cat_beyond_the_largest_rank_is_refused():
    half = MAX_RANK // 2
    adapters = [adapter({(0, 1): half}), adapter({(0, 1): half, (0, 2): MAX_RANK})]
    assert merged(adapters, (1.0, 1.0), "cat").ranks == {(0, 1): MAX_RANK, (0, 2): MAX_RANK}
    adapters[1] = adapter({(0, 1): half + 1})
    message = rf"\[{half}, {half + 1}\] at model\.layers\.0\.self_attn\.k_proj.* at most {MAX_RANK}"
    with pytest.raises(AdapterError, match=message):
        merged(adapters, (1.0, 1.0), "cat")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"weights": ()}, r"weights=\(\) .*one for each adapter"),
        ({"weights": (1.0, float("nan"))}, r"weights=\(1.0, nan\) .*finite"),
        ({"weights": 1.0}, r"weights=1\.0 .*finite"),
        ({"weights": ("1", 1.0)}, r"weights=\('1', 1\.0\) .*finite"),
        ({"weights": (10**400, 1.0)}, "weights=.*finite"),
        ({"density": "all"}, "density='all' .*above 0"),
        ({"seed": 0.5}, "seed=0.5 .*an integer"),
        ({"strategy": "svd"}, "strategy='svd' .*'linear', 'cat', 'ties', 'dare_linear'"),
        ({"density": 0.0}, "density=0.0 .*above 0 and at most 1"),
        ({"density": 1.5}, "density=1.5 .*above 0"),
        ({"density": float("nan")}, "density=nan .*above 0"),
        ({"majority_sign_method": "mean"}, "majority_sign_method='mean' .*'total', 'frequency'"),
        ({"seed": -1}, "seed=-1 .*at least 0"),
    ],
)
def test_what_is_not_allowed_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Merge(**{"weights": (1.0, 1.0)} | fields)


@pytest.mark.parametrize("num_adapters", [0, 1, 3])
def test_there_is_a_weight_for_each_adapter(num_adapters):
    adapters = [adapter({(0, 0): 4})] * num_adapters
    with pytest.raises(AdapterError, match=rf"weights=\(1.0, 0.5\) .*{num_adapters} adapters"):
        merged(adapters, (1.0, 0.5))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_adapter_is_only_multiplied(strategy):
    one = adapter(dict.fromkeys(PLACES, 5))
    own = deltas_of(one)
    assert_close(deltas_of(merged([one], (1.0,), strategy, 0.5)), own)
    expected = {place: -2.5 * delta for place, delta in own.items()}
    assert_close(deltas_of(merged([one], (-2.5,), strategy, 0.5)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_half_precision_is_merged_in_float32(strategy, dtype):
    ranks = dict.fromkeys(PLACES, 4)
    halves = [adapter(ranks, seed, dtype) for seed in range(2)]
    floats = [
        AdapterWeights(
            {place: a.float() for place, a in half.a.items()},
            {place: b.float() for place, b in half.b.items()},
            torch.float32,
            half.scalings,
        )
        for half in halves
    ]
    of_halves = merged(halves, (0.6, -0.4), strategy, 0.5, dtype=torch.bfloat16)
    of_floats = merged(floats, (0.6, -0.4), strategy, 0.5)
    assert (of_halves.dtype, of_floats.dtype) == (torch.bfloat16, torch.float32)
    for place in PLACES:
        for half, full in ((of_halves.a, of_floats.a), (of_halves.b, of_floats.b)):
            assert half[place].dtype == torch.float32
            assert torch.equal(half[place], full[place])


def test_the_order_of_adapters_does_not_matter_to_linear():
    ranks = dict.fromkeys(PLACES, 4)
    adapters, weights = [adapter(ranks, seed) for seed in range(3)], (0.5, -0.3, 0.8)
    there = merged(adapters, weights)
    back = merged(adapters[::-1], weights[::-1])
    assert_close(there.a, back.a)
    assert_close(there.b, back.b)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_seed_alone_decides_the_bytes(strategy):
    ranks = dict.fromkeys(PLACES, 4)

    def pack(seed: int) -> bytes:
        # The state of the global generators does not matter.
        torch.manual_seed(seed + 1)
        np.random.seed(seed + 1)
        adapters = [adapter(ranks, number) for number in range(2)]
        weights = merged(adapters, (0.5, 0.5), strategy, 0.5, seed=seed)
        for tensor in weights.a.values():
            assert tensor.data_ptr() not in {a.data_ptr() for w in adapters for a in w.a.values()}
        return pack_image(weights, SPEC, 3 * 2048 + 64).buffer.numpy().tobytes()

    first, torch_state = pack(3), torch.get_rng_state()
    numpy_state = np.random.get_state()[1].tolist()
    assert pack(3) == first
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.random.get_state()[1].tolist() == numpy_state
    assert (pack(4) != first) == strategy.startswith("dare")


def test_of_equal_magnitudes_the_first_are_kept():
    place, module = (0, 0), SPEC.modules[0]
    ones = AdapterWeights(
        {place: torch.ones(2, module.in_features)},
        {place: -torch.ones(module.out_features, 2)},
        torch.float32,
    )
    ones.a[place][1, 5] = -2.0
    result = merged([ones, ones], (1.0, 0.0), "magnitude_prune", 0.1)
    kept = result.a[place].flatten().nonzero().flatten().tolist()
    size = ones.a[place].numel()
    assert kept == [*range(int(0.1 * size) - 1), module.in_features + 5]
    assert result.b[place].count_nonzero() == int(0.1 * ones.b[place].numel())


@pytest.mark.parametrize("strategy", ["ties", "magnitude_prune"])
def test_a_density_too_small_for_one_entry_leaves_none(strategy):
    adapters = [adapter({(0, 1): 2}, seed) for seed in range(2)]
    result = merged(adapters, (1.0, 1.0), strategy, 1e-9)
    assert not result.a[0, 1].any()
    assert not result.b[0, 1].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_not_finite_does_not_get_lost(strategy, value):
    adapters = [adapter({(0, 1): 2}, seed) for seed in range(2)]
    adapters[1].b[0, 1][3, 1] = value
    result = merged(adapters, (1.0, 0.0), strategy, 0.01)
    with pytest.raises(AdapterError, match=r"self_attn\.k_proj\.lora_B.*infinite or NaN"):
        pack_image(result, SPEC, 3 * 2048)
