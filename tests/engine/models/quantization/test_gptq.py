"""GPTQ checkpoints, packed here by the layout that AutoGPTQ and GPTQModel publish."""

from __future__ import annotations

import pytest
import torch
from quantised_models import check_mixed_batch, check_products, write_quantised
from quantisers import gptq

from loraplex.engine.models.quantization.gptq import Gptq

CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}


@pytest.mark.parametrize(
    "change",
    [
        {"desc_act": True},
        {"bits": 8, "sym": False, "checkpoint_format": "gptq_v2"},
    ],
    ids=str,
)
def test_a_mixed_batch_equals_the_dequantised_model(change, tmp_path):
    config = CONFIG | change
    check_mixed_batch(*write_quantised(tmp_path, gptq(config), config), tmp_path)


def test_modules_may_differ_and_the_head_be_quantised_too(tmp_path):
    eight_bits = {"bits": 8, "group_size": 64}
    config = CONFIG | {
        "lm_head": True, "sym": False, "format": "gptq_v2",
        "dynamic": {"-:.*0.*k_proj": {}, "+:.*k_proj": eight_bits, ".*down_proj": eight_bits},
    }  # fmt: skip

    def quantise(module, weight):
        if module == "model.layers.0.self_attn.k_proj":
            return None
        differs = "k_proj" in module or "down_proj" in module
        version = {"checkpoint_format": "gptq_v2"}
        of_module = config | version | (eight_bits if differs else {})
        return gptq(of_module)("" if module == "lm_head" else module, weight)

    shape = {"vocab_size": 104}
    check_mixed_batch(*write_quantised(tmp_path, quantise, config, **shape), tmp_path)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [16, 32, -1])
@pytest.mark.parametrize(
    ("desc_act", "sym", "checkpoint_format"),
    [(False, True, "gptq"), (True, False, "gptq"), (True, True, "gptq_v2")],
)
def test_products(bits, group_size, desc_act, sym, checkpoint_format):
    config = CONFIG | {
        "bits": bits, "group_size": group_size, "desc_act": desc_act, "sym": sym,
        "checkpoint_format": checkpoint_format,
    }  # fmt: skip
    check_products(Gptq(config), gptq(config))


def test_parts_that_share_an_order_are_multiplied_as_one():
    config = CONFIG | {"desc_act": True}
    linear = check_products(Gptq(config), lambda *args: gptq(config)(*args))
    assert len(linear.weight._multipliers) == 1


def test_a_bias_of_zeros_is_left_out(tmp_path):
    def quantise(module, weight):
        result = gptq(CONFIG)(module, weight)
        return result and (result[0] | {"bias": torch.zeros(len(weight))}, result[1])

    check_mixed_batch(*write_quantised(tmp_path, quantise, CONFIG), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 2}, "bits=2 .*one of 4, 8"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format='marlin'"),
        ({"pack_dtype": "int16"}, "pack_dtype='int16'"),
        ({"dynamic": {"+:.*k_proj": {"bits": 3}}}, "bits=3 .*one of 4, 8"),
        ({"format": "marlin"}, "format='marlin'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        Gptq(CONFIG | change)


def test_groups_that_do_not_fit_are_refused_by_name():
    def quantise(module, weight):
        tensors, stands_for = gptq(CONFIG)(module, weight)
        tensors["g_idx"][5] = 3
        return tensors, stands_for

    with pytest.raises(ValueError, match=r"'model.layers.0.p0.g_idx'.*0 to 7 32 times"):
        check_products(Gptq(CONFIG), quantise)
