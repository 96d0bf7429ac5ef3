"""Quantised experts, with adapters on them, against what their weights stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architecture_check import check_batch
from architectures import SIZES, all_linears, write_random_model
from bitsandbytes import functional as bnb
from quantised_models import quantise_checkpoint
from quantisers import (
    awq,
    bitsandbytes_4bit,
    bitsandbytes_int8,
    fp8_per_block,
    gptq,
)
from transformers import AutoConfig, PreTrainedConfig

from loraplex.engine.models.experts_weight import SeparateExperts
from loraplex.engine.models.layers import ExpertLinears
from loraplex.engine.models.quantization.awq import Awq
from loraplex.engine.models.quantization.methods import quantise_experts

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": True}
KINDS = {
    "awq": (awq, AWQ),
    "gptq": (gptq(GPTQ), GPTQ),
    "fp8": (fp8_per_block, {"quant_method": "fp8", "weight_block_size": [48, 32]}),
    "nf4": (
        bitsandbytes_4bit("nf4"),
        {
            "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
            "llm_int8_skip_modules": ["v_proj"],
        },
    ),
    "int8": (bitsandbytes_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
}  # fmt: skip
MODELS = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {
        "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 96,
        "norm_topk_prob": True,
    },
}  # fmt: skip


def tiny_config(model_type: str) -> PreTrainedConfig:
    sizes = {**SIZES, "hidden_size": 128, "intermediate_size": 192, "head_dim": 64}
    return AutoConfig.for_model(
        model_type, **sizes, **MODELS[model_type], pad_token_id=None, dtype="float32"
    )


def check(model_type: str, tmp_path: Path, quantise: Any, settings: Any, **options: Any) -> None:
    config = tiny_config(model_type)
    adapters = write_random_model(config, tmp_path, all_linears(config))
    dense = tmp_path / "model"
    quantise_checkpoint(dense, tmp_path / "quantised", quantise, settings)
    check_batch(tmp_path / "quantised", adapters, "cpu", oracle=dense, **options)


@pytest.mark.parametrize(
    ("model_type", "kind"), [("mixtral", kind) for kind in KINDS] + [("qwen3_moe", "gptq")]
)
def test_a_mixed_batch_equals_the_dequantised_model(
    model_type: str, kind: str, tmp_path: Path, one_thread: None
):
    check(model_type, tmp_path, *KINDS[kind])


def test_experts_are_quantised_on_load(tmp_path: Path, one_thread: None):
    def on_load(module: str, weight: torch.Tensor):
        if module == "lm_head":
            return None
        rounded = bnb.dequantize_4bit(*bnb.quantize_4bit(weight, quant_type="nf4"))
        return {"weight": weight}, rounded

    check("mixtral", tmp_path, on_load, None, quantization="bitsandbytes")


def test_experts_that_are_left_out_stay_as_they_are():
    widths = {"gate_proj": 64, "up_proj": 64}
    experts = ExpertLinears("experts.", "gate_up_proj", 3, 64, widths, torch.empty(0))
    quantise_experts([experts], Awq({**AWQ, "modules_to_not_convert": ["experts.1.up_proj"]}))
    assert isinstance(experts.weight, SeparateExperts)
    names = [name for name, _ in experts.named_weights()]
    assert "experts.1.up_proj.weight" in names
    assert "experts.1.gate_proj.qweight" in names
    assert len(names) == 5 * 3 + 1
