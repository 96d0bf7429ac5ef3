"""compressed-tensors checkpoints, packed by the package that defines them."""

from __future__ import annotations

import pytest
import torch
from quantised_models import check_mixed_batch, check_products, write_quantised
from quantisers import compressed_integers, fp8_per_row, int8_per_row

from loraplex.engine.models.quantization.compressed_tensors import CompressedTensors, PackedPart
from loraplex.engine.models.quantization.eight_bits import EightBitPart
from loraplex.engine.models.quantization.settings import with_current_names


def make_config(storage: str, activations=None, **weights) -> dict:
    return {
        "quant_method": "compressed-tensors", "format": storage, "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"], "input_activations": activations,
                "weights": {"type": "int", "symmetric": True, "dynamic": False, **weights},
            }
        },
    }  # fmt: skip


GROUPS = {"strategy": "group", "group_size": 32}
DYNAMIC = {"num_bits": 8, "dynamic": True}
KINDS = {
    "int4": (make_config("pack-quantized", num_bits=4, **GROUPS), compressed_integers(4, 32)),
    "int4 with zeros": (
        make_config("pack-quantized", num_bits=4, symmetric=False, **GROUPS),
        compressed_integers(4, 32, symmetric=False),
    ),
    "int4 in order": (
        make_config("pack-quantized", num_bits=4, actorder="group", **GROUPS),
        compressed_integers(4, 32, has_order=True),
    ),
    "packed int8": (
        make_config("pack-quantized", num_bits=8, strategy="channel"), compressed_integers(8, None),
    ),
    "int8": (make_config("int-quantized", DYNAMIC, num_bits=8, strategy="channel"), int8_per_row),
    "float8": (
        make_config("float-quantized", DYNAMIC, num_bits=8, type="float", strategy="channel"),
        fp8_per_row,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("config", "quantise"), KINDS.values(), ids=KINDS)
def test_products(config, quantise):
    check_products(CompressedTensors(config), quantise)


def test_groups_of_modules_have_settings_of_their_own(tmp_path):
    config, of_attention = KINDS["int4 with zeros"]
    other, of_mlp = KINDS["float8"]
    groups = {
        "attention": config["config_groups"]["group_0"] | {"targets": ["re:.*self_attn.*"]},
        "mlp": other["config_groups"]["group_0"]
        | {"targets": ["re:.*mlp.*"], "format": "float-quantized"},
    }
    config = config | {"config_groups": groups, "ignore": ["lm_head", "re:.*k_proj"]}

    def quantise(module, weight):
        if "k_proj" in module:
            return None
        return (of_attention if "self_attn" in module else of_mlp)(module, weight)

    check_mixed_batch(*write_quantised(tmp_path, quantise, config), tmp_path)


def test_names_of_modules_count_more_than_their_class():
    (config, _), (other, _) = KINDS["float8"], KINDS["int4"]
    names = {"targets": ["re:.*down_proj", "model.layers.1.self_attn.q_proj"]}
    of_names = other["config_groups"]["group_0"] | names | {"format": "pack-quantized"}
    # Modules may be named as in older checkpoints.
    config = config | {"ignore": ["embed_out", "re:gpt_neox"]}
    config["config_groups"] = config["config_groups"] | {"names": of_names}
    method = CompressedTensors(
        with_current_names(config, {"embed_out.": "lm_head.", "gpt_neox.": "model.layers.0."})
    )
    like = torch.empty(0)
    kinds = [
        type(method.part(module, 64, 64, like))
        for module in (
            "lm_head", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj",
            "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj",
        )
    ]  # fmt: skip
    assert kinds == [type(None), type(None), EightBitPart, PackedPart, PackedPart]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (make_config("marlin-24", num_bits=4, **GROUPS), "format='marlin-24'"),
        (make_config("pack-quantized", num_bits=3, **GROUPS), "num_bits=3.*one of 4, 8"),
        (make_config("int-quantized", num_bits=4, **GROUPS), "num_bits=4.*one of 8"),
        (make_config("pack-quantized", num_bits=4, strategy="block"), "strategy='block'"),
        (make_config("int-quantized", num_bits=8, symmetric=False), "symmetric=False"),
        (
            make_config("int-quantized", num_bits=8) | {"kv_cache_scheme": {"num_bits": 8}},
            "kv_cache_scheme=.*one of None",
        ),
        (
            make_config("int-quantized", num_bits=8)
            | {"transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}},
            "transform_config=.*R1.*must be absent",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(config, message):
    with pytest.raises(ValueError, match=message):
        CompressedTensors(config)
