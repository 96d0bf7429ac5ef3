"""FP8 checkpoints with each kind of scale, and plain checkpoints that are rounded on load."""

from __future__ import annotations

import pytest
from quantised_models import check_mixed_batch, check_products, write_quantised
from quantisers import fp8_per_block, fp8_per_row, fp8_per_tensor

from loraplex.engine.models.quantization.fp8 import FbgemmFp8, Fp8, Fp8OnLoad

PER_TENSOR = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
OF_TRANSFORMERS = {
    "quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None,
}  # fmt: skip
PER_BLOCK = {"quant_method": "fp8", "weight_block_size": [48, 32]}
PER_ROW = {"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["lm_head"]}


def fp8_per_tensor_of_transformers(module, weight):
    tensors, stands_for = fp8_per_tensor(module, weight)
    tensors["weight_scale_inv"] = tensors.pop("weight_scale")
    tensors["activation_scale"] = tensors.pop("input_scale")
    return tensors, stands_for


KINDS = {
    "tensor": (Fp8, PER_TENSOR, fp8_per_tensor),
    "tensor, as transformers names it": (
        Fp8,
        OF_TRANSFORMERS,
        fp8_per_tensor_of_transformers,
    ),
    "row": (FbgemmFp8, PER_ROW, fp8_per_row),
    "block": (Fp8, PER_BLOCK, fp8_per_block),
}


@pytest.mark.parametrize(("method", "config", "quantise"), KINDS.values(), ids=KINDS)
def test_products(method, config, quantise):
    check_products(method(config), quantise)


def test_a_mixed_batch_equals_the_dequantised_model(tmp_path):
    check_mixed_batch(*write_quantised(tmp_path, fp8_per_tensor, PER_TENSOR), tmp_path)


def on_load(module, weight):
    result = fp8_per_row(module, weight)
    return result and ({"weight": weight}, result[1])


def test_rounding_on_load(tmp_path):
    check_products(Fp8OnLoad(), on_load)
    quantised, dense = write_quantised(tmp_path, on_load, None)
    check_mixed_batch(quantised, dense, tmp_path, quantization="fp8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fmt": "e5m2"}, "fmt='e5m2'"),
        ({"activation_scheme": "none"}, "activation_scheme='none'.*'dynamic', 'static'"),
        ({"weight_block_size": 128}, "weight_block_size=128"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        Fp8(PER_TENSOR | change)
