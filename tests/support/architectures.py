"""Tiny configs of every architecture, with sizes that nothing is a multiple of.

Each case is one way in which checkpoints of the architecture come.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

# What the cases share; a case says what it has otherwise. Heads of 80, groups of 3.
SIZES = {
    "vocab_size": 131,
    "hidden_size": 96,
    "intermediate_size": 120,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 80,
    "max_position_embeddings": 128,
}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "Llama 2": {"model_type": "llama"},
    "Llama 3": {
        "model_type": "llama", "rope_parameters": LLAMA3_ROPE, "hidden_size": 112,
        "num_attention_heads": 7, "tie_word_embeddings": True,
    },
    "Mistral": {"model_type": "mistral", "sliding_window": None},
    "Mistral, sliding window": {"model_type": "mistral", "sliding_window": 13},
    "Qwen2": {"model_type": "qwen2", "head_dim": None, "hidden_size": 240},
    "Qwen2, sliding window": {
        "model_type": "qwen2", "head_dim": None, "hidden_size": 288, "num_key_value_heads": 3,
        "use_sliding_window": True, "sliding_window": 13, "max_window_layers": 1,
    },
    "Qwen3": {"model_type": "qwen3", "hidden_size": 112, "num_attention_heads": 7, "head_dim": 96},
}  # fmt: skip


def tiny_config(case: str) -> PreTrainedConfig:
    """The transformers config of a case."""
    values = {name: value for name, value in {**SIZES, **CASES[case]}.items() if value is not None}
    return AutoConfig.for_model(
        **values, bos_token_id=0, eos_token_id=1, pad_token_id=None, dtype="float32"
    )


def write_tiny_model(config: PreTrainedConfig, directory: Path) -> dict[str, Path]:
    """Write a random model to directory/model; returns PEFT adapters on all of its linears."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        _randomise(parameter)
    model.save_pretrained(directory / "model")
    adapters = {}
    for name, rank in (("small", 3), ("large", 12)):
        lora = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        peft_model = get_peft_model(model, lora)
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                _randomise(parameter, 0.5)
        peft_model.save_pretrained(directory / name)
        model = peft_model.unload()
        adapters[name] = directory / name
    return adapters


@torch.no_grad()
def _randomise(parameter: torch.Tensor, size: float = 1.0) -> None:
    """Values that let every weight matter: rows of about `size`, and norms around 1."""
    if parameter.dim() >= 2:
        parameter.normal_(0.0, size * parameter.shape[-1] ** -0.5)
    else:
        parameter.uniform_(0.5, 1.5)
