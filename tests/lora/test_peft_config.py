"""What adapter_config.json may say, and how what it may not say is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from loraplex.lora.peft_config import adapter_fingerprint, parse_peft_config, read_peft_config
from loraplex.lora.spec import AdapterError

PLAIN = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
Q0 = "model.layers.0.self_attn.q_proj"
Q11 = "model.layers.11.self_attn.q_proj"


def parse(**values):
    return parse_peft_config(PLAIN | values)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("peft_type", "IA3", "'LORA'"),
        ("peft_type", None, "'LORA'"),
        ("bias", "some", "'none', 'lora_only' or 'all'"),
        ("use_dora", "yes", "true or false"),
        ("lora_bias", 1, "true or false"),
        ("use_qalora", True, "off"),
        ("use_bdlora", {"nblocks": 2}, "off"),
        ("alora_invocation_tokens", [1, "2"], "a list of token ids"),
        ("alora_invocation_tokens", [-1], "a list of token ids"),
        ("alora_invocation_tokens", 7, "a list of token ids"),
        ("megatron_config", {"hidden": 1}, "off"),
        ("layer_replication", [[0, 4], [2, 5]], "off"),
        ("trainable_token_indices", [-1], "a list of token ids"),
        ("trainable_token_indices", "1", "a list of token ids"),
        ("target_parameters", ["gate.weight", 3], "a list of names of parameters"),
        ("arrow_config", {"top_k": 3}, "off"),
        ("kasa_config", {"beta": 1}, "off"),
        ("monteclora_config", {"num_samples": 8}, "off"),
        ("velora_config", {"scale": 1}, "off"),
        ("something_of_next_year", 1, "off"),
        ("init_lora_weights", "pissa", "'gaussian'"),
        ("init_lora_weights", "pissa_niter_16", "'gaussian'"),
        ("init_lora_weights", "olora", "'gaussian'"),
        ("init_lora_weights", "corda", "'gaussian'"),
        ("init_lora_weights", "loftq", "'gaussian'"),
        ("init_lora_weights", "lora_ga", "'gaussian'"),
        ("r", 0, "1 to 256"),
        ("r", 257, "1 to 256"),
        ("r", 8.0, "1 to 256"),
        ("r", True, "1 to 256"),
        ("r", "8", "1 to 256"),
        ("lora_alpha", math.nan, "finite"),
        ("lora_alpha", 10**400, "finite"),
        ("lora_alpha", None, "finite"),
        ("use_rslora", "yes", "true or false"),
        ("rank_pattern", ["q_proj"], "an object"),
        ("target_modules", [1], "a list of module names"),
        ("target_modules", {"q_proj": 1}, "a list of module names"),
        ("exclude_modules", 3, "a list of module names"),
        ("layers_to_transform", ["1"], "layer indices"),
    ],
)
def test_refused_by_name_value_and_what_is_allowed(key, value, allowed):
    with pytest.raises(AdapterError) as caught:
        parse(**{key: value})
    message = str(caught.value)
    assert message.startswith(f"adapter_config.json: {key}={value!r}"[:60])
    assert allowed in message
    assert caught.value.status == 400
    assert len(message) < 400, "a huge value doesn't make a huge message"


@pytest.mark.parametrize(
    ("key", "value", "culprit"),
    [
        ("rank_pattern", {"q_proj": 0}, "rank_pattern['q_proj']=0"),
        ("rank_pattern", {"k_proj": 8, "q_proj": 300}, "rank_pattern['q_proj']=300"),
        ("alpha_pattern", {"q_proj": "2"}, "alpha_pattern['q_proj']='2'"),
        ("rank_pattern", {"(q_proj": 8}, "not a regular expression"),
        ("alpha_pattern", {"(?i)q_proj": 8}, "not a regular expression"),
        ("target_modules", "*q_proj", "not a regular expression"),
    ],
)
def test_a_bad_entry_of_a_pattern_is_named(key, value, culprit):
    with pytest.raises(AdapterError) as caught:
        parse(**{key: value})
    assert culprit in str(caught.value)
    assert key in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {
            "use_dora": False,
            "modules_to_save": None,
            "layer_replication": [],
            "megatron_config": {},
        },
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
        {"loftq_config": {"loftq_bits": 4}, "lora_dropout": 0.1, "megatron_core": "megatron.core"},
        {"auto_mapping": {"a": "b"}, "peft_version": "0.21", "qalora_group_size": 16},
        {"something_of_next_year": None},
        {"bias": None, "use_rslora": None, "rank_pattern": None, "alpha_pattern": None},
    ],
)
def test_what_does_not_change_the_result_is_accepted(values):
    config = parse(**values)
    assert (config.rank, config.alpha) == (8, 16)


def test_scaling():
    assert parse().scaling_of(Q0) == 2
    assert parse(r=16, lora_alpha=3.5).scaling_of(Q0) == 3.5 / 16
    assert parse(use_rslora=True).scaling_of(Q0) == 16 / math.sqrt(8)
    both = parse(use_rslora=True, rank_pattern={"q_proj": 4}, alpha_pattern={"q_proj": 6})
    assert both.scaling_of(Q0) == 3
    assert both.scaling_of("model.layers.0.self_attn.v_proj") == 16 / math.sqrt(8)


def test_missing_rank_and_alpha_are_pefts_defaults():
    config = parse_peft_config({"peft_type": "LORA"})
    assert (config.rank, config.alpha) == (8, 8)


@pytest.mark.parametrize(
    ("pattern", "matches_q0", "matches_q11"),
    [
        ("q_proj", True, True),
        ("proj", False, False),
        (".*proj", True, True),
        ("self_attn.q_proj", True, True),
        ("layers.1.self_attn.q_proj", False, False),
        ("1.self_attn.q_proj", False, False),
        ("layers.11.self_attn.q_proj", False, True),
        ("^model.layers.0.self_attn.q_proj", True, False),
        ("^q_proj", False, False),
        (r"layers\.\d\..*", True, False),
        ("q_proj|k_proj", True, True),
        ("model", False, False),
    ],
)
def test_rank_pattern_matches_as_pefts_does(pattern, matches_q0, matches_q11):
    from peft.utils.other import get_pattern_key

    config = parse(rank_pattern={pattern: 3})
    for name, expected in ((Q0, matches_q0), (Q11, matches_q11)):
        assert (config.rank_of(name) == 3) == expected
        assert (get_pattern_key([pattern], name) == pattern) == expected


def test_the_first_matching_pattern_decides():
    config = parse(rank_pattern={"layers.0.self_attn.q_proj": 4, "q_proj": 2, ".*": 1})
    assert config.rank_of(Q0) == 4
    assert config.rank_of(Q11) == 2
    assert config.rank_of("model.layers.0.mlp.up_proj") == 1


@pytest.mark.parametrize(
    ("values", "name", "expected"),
    [
        ({"target_modules": ["q_proj"]}, Q0, True),
        ({"target_modules": ["proj"]}, Q0, False),
        ({"target_modules": [Q0]}, Q0, True),
        ({"target_modules": [Q0]}, Q11, False),
        ({"target_modules": ["self_attn.q_proj"]}, Q11, True),
        ({"target_modules": r".*\.(q|v)_proj"}, Q0, True),
        ({"target_modules": r"(q|v)_proj"}, Q0, False),
        ({"target_modules": r".*\.q_pro"}, Q0, False),
        ({"exclude_modules": ["q_proj"]}, Q0, False),
        ({"exclude_modules": r".*layers\.0\..*"}, Q0, False),
        ({"exclude_modules": r".*layers\.0\..*"}, Q11, True),
        ({"layers_to_transform": [0, 3]}, Q0, True),
        ({"layers_to_transform": [0, 3]}, Q11, False),
        ({"layers_to_transform": 11}, Q11, True),
        ({"layers_to_transform": 1}, Q11, False),
        ({"layers_to_transform": []}, Q11, True),
        ({"layers_to_transform": [1], "target_modules": [Q0]}, Q0, True),
    ],
)
def test_targets_as_peft_does(values, name, expected):
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    assert parse(**values).targets(name) == expected
    assert bool(check_target_module_exists(LoraConfig(**(PLAIN | values)), name)) == expected


def test_all_linear_and_null_target_everything():
    assert parse(target_modules="all-linear").targets(Q0)
    assert parse(target_modules="All-Linear").targets(Q0)
    assert parse(target_modules=None).targets(Q0)
    assert not parse(target_modules=[]).targets(Q0)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
    ],
)
def test_broken_files(tmp_path, content, complaint):
    (tmp_path / "adapter_config.json").write_bytes(content)
    with pytest.raises(AdapterError, match=complaint) as caught:
        read_peft_config(tmp_path)
    assert caught.value.status == 400


@pytest.mark.parametrize("name", ["nowhere", "adapter_config.json", "a\0b", "x" * 5000])
def test_a_path_that_is_no_directory_is_not_found(tmp_path, name):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterError, match="does not exist or is not a directory") as caught:
        read_peft_config(tmp_path / name)
    assert caught.value.status == 404


def test_missing_config(tmp_path):
    with pytest.raises(AdapterError, match=r"adapter_config\.json is missing in adapter path"):
        read_peft_config(tmp_path)


def test_config_that_cannot_be_read(tmp_path):
    (tmp_path / "adapter_config.json").mkdir()
    with pytest.raises(AdapterError, match="cannot be read"):
        read_peft_config(tmp_path)


def test_fingerprint_changes_with_the_files(tmp_path: Path):
    path = str(tmp_path)
    seen = {adapter_fingerprint(path)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(PLAIN))
    seen.add(adapter_fingerprint(path))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"one")
    seen.add(adapter_fingerprint(path))
    assert adapter_fingerprint(path) in seen
    (tmp_path / "adapter_model.safetensors").write_bytes(b"longer")
    seen.add(adapter_fingerprint(path))
    assert len(seen) == 4
    assert adapter_fingerprint("no\0where") == adapter_fingerprint("/nowhere")


def test_routers_are_targeted_by_their_weight():
    config = parse(target_modules=["q_proj"], target_parameters=["mlp.gate.weight"])
    assert config.targets("model.layers.0.mlp.gate")
    assert config.targets(Q0)
    assert not config.targets("model.layers.0.gate")
    assert not config.targets("model.layers.0.mlp.experts")
    assert config.parameters_of("model.layers.0.mlp") == []


@pytest.mark.parametrize("prefix", ["", "experts.", "model.layers.0.mlp.experts."])
def test_parameters_of_experts_come_in_their_order(prefix: str):
    names = [f"{prefix}{name}" for name in ("down_proj", "gate_up_proj")]
    config = parse(target_modules=["q_proj"], target_parameters=names)
    experts = "model.layers.0.mlp.experts"
    assert config.parameters_of(experts) == ["gate_up_proj", "down_proj"]
    assert config.targets(f"{experts}.down_proj")
    assert config.parameters_of("model.layers.0.other") == (
        [] if prefix else ["gate_up_proj", "down_proj"]
    )
