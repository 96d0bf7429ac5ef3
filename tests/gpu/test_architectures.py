"""Every architecture, tiny and random, on a CUDA device: float32 as transformers and PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
from architecture_check import check_model
from architectures import CASES, FALLBACK_CASES, all_linears, tiny_config


@pytest.mark.parametrize("case", [*CASES, *FALLBACK_CASES])
def test_a_mixed_batch_equals_transformers_and_peft(case: str, tmp_path: Path):
    config = tiny_config(case)
    targets = all_linears(config)
    if "target_parameters" in targets:
        targets["target_parameters"] = ["gate.weight"]  # and not those of experts
    check_model(config, targets, tmp_path, "cuda")


def test_adapters_of_experts_are_refused(tmp_path: Path):
    config = tiny_config("Mixtral")
    with pytest.raises(ValueError, match="LoRA on experts is served on the CPU, not on GPUs"):
        check_model(config, all_linears(config), tmp_path, "cuda")
