"""Shares of quantised linears, by outputs and by inputs, make what the whole does."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from quantisers import (
    awq,
    bitsandbytes_int8,
    compressed_integers,
    fp8_per_row,
    fp8_per_tensor,
    gptq,
)

from loraplex.engine.models.layers import Linear
from loraplex.engine.models.loader import copy_to_place
from loraplex.engine.models.quantization.methods import find_method, quantise
from loraplex.engine.models.shards import WHOLE, Shard, take_share

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False}
ORDERED = GPTQ | {"desc_act": True}
PACKED = {
    "quant_method": "compressed-tensors", "format": "pack-quantized",
    "config_groups": {"all": {"targets": ["Linear"], "weights": {
        "num_bits": 8, "strategy": "group", "group_size": 32, "symmetric": False}}},
}  # fmt: skip
KINDS = {
    "plain": (None, lambda _, weight: ({"weight": weight}, weight)),
    "awq": ({"quant_method": "awq", "group_size": 32}, awq),
    "gptq": (GPTQ, gptq(GPTQ)),
    "fp8 per tensor": ({"quant_method": "fp8", "activation_scheme": "static"}, fp8_per_tensor),
    "fp8 per row": ({"quant_method": "fbgemm_fp8"}, fp8_per_row),
    "int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, bitsandbytes_int8),
    "packed": (PACKED, compressed_integers(8, 32, symmetric=False)),
}


def load(config, tensors, out_features: int, in_features: int, shard: Shard) -> Linear:
    linear = Linear("", in_features, {"up_proj": out_features}, torch.float32)
    method = find_method(None, SimpleNamespace(quantization_config=config))
    if method is not None:
        quantise([linear], method)
    for name, place in linear.named_weights():
        tensor = tensors[name.removeprefix("up_proj.")]
        copy_to_place(name, take_share(tensor, place.shape, shard), place)
    linear.finish_loading()
    return linear


@pytest.mark.parametrize(("config", "quantiser"), KINDS.values(), ids=KINDS)
def test_shares_make_the_whole(config, quantiser):
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    tensors, _ = quantiser("up_proj", weight)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    whole = load(config, tensors, 64, 128, WHOLE)(x, None)
    shards = [Shard(i, 2) for i in range(2)]
    by_outputs = [load(config, tensors, 32, 128, shard)(x, None) for shard in shards]
    torch.testing.assert_close(torch.cat(by_outputs, dim=1), whole, rtol=1e-5, atol=1e-5)
    halves = x.split(64, dim=1)
    by_inputs = [
        load(config, tensors, 64, 64, shard)(half, None)
        for shard, half in zip(shards, halves, strict=True)
    ]
    torch.testing.assert_close(sum(by_inputs), whole, rtol=1e-4, atol=1e-4)


def test_what_can_not_be_divided_is_refused():
    tensors, _ = gptq(ORDERED)("up_proj", torch.randn(64, 128))
    with pytest.raises(ValueError, match="g_idx.*must have every group"):
        load(ORDERED, tensors, 64, 64, Shard(1, 2))
    blocks = {"quant_method": "fp8", "weight_block_size": [64, 64]}
    method = find_method(None, SimpleNamespace(quantization_config=blocks), num_shards=2)
    with pytest.raises(ValueError, match="k_proj .* 96 outputs in each process.*no multiple of 64"):
        method.part("k_proj", 96, 128, torch.empty(0))
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(ValueError, match="tensor_parallel_size=2 .*4 bits"):
        find_method(None, SimpleNamespace(quantization_config=config), num_shards=2)
