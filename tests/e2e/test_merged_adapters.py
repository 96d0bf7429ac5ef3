"""Several adapters on one request, and scales of a request's own, against PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
from oracle import Oracle
from peft.tuners.lora import LoraLayer
from tiny_model import check_against_peft, tiny_llm, write_peft_adapter, write_tiny_model

from loraplex import LoRARequest, MergedAdapters, SamplingParams

CONFIGS = {
    "attention": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "linear": {"target_modules": "all-linear", "use_rslora": True},
    "wide": {"target_modules": ["q_proj", "down_proj"], "r": 12},
}
MERGES = {
    "sum": {"adapters": ("attention", "linear"), "weights": (0.7, -0.4)},
    "trimmed": {
        "adapters": ("attention", "linear"),
        "weights": (1.0, 0.5),
        "strategy": "ties",
        "density": 0.6,
        "majority_sign_method": "frequency",
    },
    "joined": {
        "adapters": ("attention", "linear", "wide"),
        "weights": (0.5, 1.0, 0.8),
        "strategy": "cat",
    },
}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapters(model_path, tmp_path_factory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("adapters")
    return {
        name: write_peft_adapter(model_path, directory / name, seed, **config)
        for seed, (name, config) in enumerate(CONFIGS.items())
    }


def plain(adapters: dict[str, Path], name: str, **options) -> LoRARequest:
    return LoRARequest(name, str(adapters[name]), **options)


def merged(adapters: dict[str, Path], name: str, scale: float = 1.0) -> LoRARequest:
    merge = {**MERGES[name], "adapters": [plain(adapters, n) for n in MERGES[name]["adapters"]]}
    return LoRARequest(name, merged_adapters=MergedAdapters(**merge), scale=scale)


def multiply_scaling(oracle: Oracle, name: str, scale: float) -> None:
    for module in oracle.model.modules():
        if isinstance(module, LoraLayer) and name in module.scaling:
            module.scaling[name] *= scale


@pytest.mark.filterwarnings("ignore")
def test_merged_and_scaled_adapters_equal_peft(model_path, adapters, one_thread):
    oracle = Oracle(model_path, adapters)
    requests = {name: plain(adapters, name) for name in adapters}
    for name, merge in MERGES.items():
        options = {k: v for k, v in merge.items() if k not in ("adapters", "weights", "strategy")}
        oracle.model.add_weighted_adapter(
            list(merge["adapters"]),
            list(merge["weights"]),
            name,
            combination_type=merge.get("strategy", "linear"),
            **options,
        )
        requests[name] = merged(adapters, name)
    # PEFT's merged adapters inherit what ours do not; see loraplex.lora.merge.
    assert not CONFIGS["attention"].get("use_rslora")
    for name, source, scale in (("halved", "linear", 0.5), ("negated", "wide", -1.5)):
        oracle.model.load_adapter(str(adapters[source]), adapter_name=name)
        multiply_scaling(oracle, name, scale)
        requests[name] = plain(adapters, source, scale=scale)
    multiply_scaling(oracle, "trimmed", 2.0)
    requests["trimmed"] = merged(adapters, "trimmed", scale=2.0)
    with tiny_llm(model_path) as llm:
        check_against_peft(llm, oracle, requests)
        num_loads = llm.stats()["adapter_loads"]
        check_against_peft(llm, oracle, requests, max_tokens=2)
        assert llm.stats()["adapter_loads"] == num_loads == len(requests), "each is made once"


def test_another_scale_is_another_adapter_for_the_prefix_cache(model_path, adapters):
    with tiny_llm(model_path) as llm:
        prompt, hits = list(range(40)), []
        for scale in (1.0, 0.5, 1.0, 0.5):
            request = plain(adapters, "linear", scale=scale)
            params = SamplingParams(max_tokens=1, detokenize=False)
            llm.generate([{"prompt_token_ids": prompt}], params, request, use_tqdm=False)
            hits.append(llm.stats()["prefix_hit_tokens"])
    assert hits == [0, 0, 32, 64]


def test_a_part_that_cannot_be_served_is_named(model_path, adapters, tmp_path):
    missing = LoRARequest("missing", str(tmp_path / "missing"))
    merge = MergedAdapters(adapters=[plain(adapters, "wide"), missing], weights=[1, 1])
    request = LoRARequest("blend", merged_adapters=merge)
    with tiny_llm(model_path) as llm:
        (output,) = llm.generate([[1, 2]], None, request, use_tqdm=False, return_errors=True)
        assert f"{tmp_path / 'missing'}': there is no such directory" in str(output.error)
        assert output.error.status == 404
        merge = MergedAdapters(
            adapters=[plain(adapters, "wide"), plain(adapters, "linear")], weights=[1, 1]
        )
        request = LoRARequest("blend", merged_adapters=merge)
        with pytest.raises(ValueError, match="strategy='linear' is not allowed for adapters of"):
            llm.generate([[1, 2]], None, request, use_tqdm=False)


def test_what_is_wrong_with_a_request_is_said():
    part = LoRARequest("part", "/part")
    scaled = LoRARequest("scaled", "/part", scale=2)
    for fields, message in (
        ({"weights": [1, 2]}, "one weight for each of the 1 adapters"),
        ({"adapters": [scaled]}, "with 'scaled' is not allowed"),
        ({"adapters": part}, r"adapters=LoRARequest\(.*must be a list of LoRARequests"),
        ({"adapters": ["part"]}, r"adapters=\['part'\] is not allowed"),
        ({"strategy": "mean"}, "strategy='mean' is not allowed"),
    ):
        with pytest.raises(ValueError, match=message):
            MergedAdapters(**{"adapters": [part], "weights": [1], **fields})
    merge = MergedAdapters(adapters=[part], weights=[1])
    for fields, message in (
        ({"lora_path": "/x", "merged_adapters": merge}, "or else merged_adapters"),
        ({"lora_path": "/x", "scale": float("nan")}, "scale=nan of adapter 'x' is not allowed"),
        ({"lora_path": "/x", "scale": "2"}, "scale='2' of adapter 'x' is not allowed"),
        ({"merged_adapters": [part]}, "merged_adapters=.* must be MergedAdapters, or None"),
    ):
        with pytest.raises(ValueError, match=message):
            LoRARequest("x", **fields)
