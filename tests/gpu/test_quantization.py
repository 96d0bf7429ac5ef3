"""Quantised linears and a quantised model on a CUDA device."""

from __future__ import annotations

import pytest
from quantised_models import check_mixed_batch, check_products, write_quantised
from quantisers import (
    awq,
    bitsandbytes_4bit,
    bitsandbytes_int8,
    fp8_per_block,
    fp8_per_row,
    fp8_per_tensor,
    gptq,
)

from loraplex.engine.models.quantization.awq import Awq
from loraplex.engine.models.quantization.bitsandbytes import BitsAndBytes
from loraplex.engine.models.quantization.fp8 import FbgemmFp8, Fp8
from loraplex.engine.models.quantization.gptq import Gptq

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
GPTQ = {"bits": 4, "group_size": 64, "sym": False, "desc_act": True}
GPTQ_8 = {"bits": 8, "group_size": -1, "sym": True, "desc_act": False}
FP8 = {"activation_scheme": "static"}
# Of activations that are rounded to FP8 too.
FP8_ERROR = 0.25
KINDS = {
    "awq": (Awq(AWQ), awq, 0.03),
    "awq, groups of 16": (Awq(AWQ | {"group_size": 16}), lambda *a: awq(*a, group_size=16), 0.03),
    "gptq": (Gptq(GPTQ), gptq(GPTQ), 0.03),
    "gptq, 8 bits": (Gptq(GPTQ_8), gptq(GPTQ_8), 0.03),
    "nf4": (
        BitsAndBytes({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
        bitsandbytes_4bit("nf4"), 0.03,
    ),
    "fp4": (
        BitsAndBytes({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}),
        bitsandbytes_4bit("fp4"), 0.03,
    ),
    "int8": (BitsAndBytes({"load_in_8bit": True}), bitsandbytes_int8, 0.03),
    "fp8 per tensor": (Fp8(FP8), fp8_per_tensor, FP8_ERROR),
    "fp8 per row": (FbgemmFp8({}), fp8_per_row, FP8_ERROR),
    "fp8 per block": (Fp8({"weight_block_size": [48, 32]}), fp8_per_block, 0.03),
}  # fmt: skip


@pytest.mark.parametrize(("method", "quantise", "error"), KINDS.values(), ids=KINDS)
def test_products(method, quantise, error):
    check_products(method, quantise, device="cuda", atol=error)


def test_products_of_large_weights():
    """Of many tiles of torch's int4 kernel, in both directions."""
    sizes = {"in_features": 1024, "out_features": (512, 128)}
    check_products(Awq(AWQ), awq, device="cuda", atol=0.06, **sizes)


@pytest.mark.parametrize("enforce_eager", [False, True])
def test_a_mixed_batch_equals_the_dequantised_model(enforce_eager, tmp_path):
    paths = write_quantised(tmp_path, awq, AWQ)
    check_mixed_batch(*paths, tmp_path, device="cuda", enforce_eager=enforce_eager)
