"""AWQ checkpoints, packed here by the layout that AutoAWQ publishes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from quantised_models import check_mixed_batch, check_products, write_quantised
from quantisers import awq

from loraplex.engine.models.quantization.awq import Awq
from loraplex.engine.models.quantization.methods import find_method

CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}


def test_a_mixed_batch_equals_the_dequantised_model(tmp_path):
    paths = write_quantised(tmp_path, awq, CONFIG)
    check_mixed_batch(*paths, tmp_path)


def test_modules_that_are_left_out(tmp_path):
    left_out = ["k_proj", "layers.1.mlp"]

    def quantise_others(module, weight):
        is_left_out = "k_proj" in module or "layers.1.mlp" in module
        return None if is_left_out else awq(module, weight)

    config = {**CONFIG, "modules_to_not_convert": left_out}
    check_mixed_batch(*write_quantised(tmp_path, quantise_others, config), tmp_path)


@pytest.mark.parametrize("group_size", [16, 32, 128, -1])
def test_products(group_size):
    check_products(
        Awq({**CONFIG, "group_size": group_size}),
        lambda _, weight: awq("", weight, weight.shape[1] if group_size == -1 else group_size),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, r"quantization_config.bits=3 .*one of 4"),
        ({"version": "gemv"}, "version='gemv'.*'gemm'"),
        ({"zero_point": False}, "zero_point=False"),
        ({"group_size": 0}, "group_size=0"),
        ({"group_size": 96}, r"layers.0.p0 .*256 inputs.*no multiple of 96"),
        ({"quant_method": "quip"}, "quant_method='quip'.*one of 'awq'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change, message):
    hf_config = SimpleNamespace(quantization_config={**CONFIG, **change})
    with pytest.raises(ValueError, match=message):
        check_products(find_method(None, hf_config), None)


def test_an_option_that_the_checkpoint_does_not_bear_out():
    with pytest.raises(ValueError, match="quantization='awq'.*no quantization_config"):
        find_method("awq", SimpleNamespace())
    with pytest.raises(ValueError, match="quantization='gptq'.*quantised by 'awq'"):
        find_method("gptq", SimpleNamespace(quantization_config=CONFIG))
    assert find_method("awq", SimpleNamespace(quantization_config=CONFIG)) is not None
