"""Adapters that were trained when each expert's linears were modules, against PEFT, which converts
them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from architecture_check import check_batch
from architectures import all_linears, tiny_config, write_random_model
from safetensors.torch import save_file

# Of each case: the MLP, and an expert's linears with their inputs and outputs.
CASES = {
    "Mixtral": ("block_sparse_moe", {"w1": (96, 120), "w2": (120, 96), "w3": (96, 120)}),
    "Qwen3-MoE": (
        "mlp", {"gate_proj": (96, 40), "up_proj": (96, 40), "down_proj": (40, 96)},
    ),
    "OLMoE": (
        "mlp", {"gate_proj": (240, 120), "up_proj": (240, 120), "down_proj": (120, 240)},
    ),
}  # fmt: skip


def write_older_adapter(case: str, num_experts: int, rank: int, path: Path) -> Path:
    """On all linears of all experts, and routers."""
    mlp, linears = CASES[case]
    (hidden, _), *_ = linears.values()
    modules = {"gate": (hidden, num_experts)}
    for expert in range(num_experts):
        modules |= {f"experts.{expert}.{name}": shape for name, shape in linears.items()}
    tensors = {}
    for layer in range(2):
        for name, (in_features, out_features) in modules.items():
            prefix = f"base_model.model.model.layers.{layer}.{mlp}.{name}"
            a, b = torch.randn(rank, in_features), torch.randn(out_features, rank)
            tensors[f"{prefix}.lora_A.weight"] = a * in_features**-0.5
            tensors[f"{prefix}.lora_B.weight"] = b * 0.5 * rank**-0.5
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank,
        "target_modules": ["gate", *linears],
    }  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("case", CASES)
def test_linears_of_each_expert_are_what_peft_makes_of_them(
    case: str, tmp_path: Path, one_thread: None
):
    config = tiny_config(case)
    attention = {"target_modules": all_linears(config)["target_modules"], "use_dora": True}
    adapters = write_random_model(config, tmp_path, attention)
    num_experts = getattr(config, "num_local_experts", None) or config.num_experts
    for rank in (2, 9):
        name = f"experts{rank}"
        adapters[name] = write_older_adapter(case, num_experts, rank, tmp_path / name)
    check_batch(tmp_path / "model", adapters, "cpu")
