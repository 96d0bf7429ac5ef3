"""Tiny configs of every architecture, with sizes that nothing is a multiple of.

Each case is one way in which checkpoints of the architecture come.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from loraplex.engine.models.registry import base_model_spec

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
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
LONG_ROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75,
    "short_factor": [1.0 + 0.01 * i for i in range(30)],
    "long_factor": [1.0 + 0.2 * i for i in range(30)],
}  # fmt: skip
MINISTRAL3_ROPE = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 16,
    "llama_4_scaling_beta": 0.3,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "Llama 2": {"model_type": "llama"},
    "Llama 3": {
        "model_type": "llama", "rope_parameters": LLAMA3_ROPE, "hidden_size": 112,
        "num_attention_heads": 7, "tie_word_embeddings": True,
    },
    "Mistral": {"model_type": "mistral", "sliding_window": None},
    "Mistral, sliding window": {"model_type": "mistral", "sliding_window": 13},
    "Ministral 3": {"model_type": "ministral3", "rope_parameters": MINISTRAL3_ROPE},
    "Qwen2": {"model_type": "qwen2", "head_dim": None, "hidden_size": 240},
    "Qwen2, sliding window": {
        "model_type": "qwen2", "head_dim": None, "hidden_size": 288, "num_key_value_heads": 3,
        "use_sliding_window": True, "sliding_window": 13, "max_window_layers": 1,
    },
    "Qwen3": {
        "model_type": "qwen3", "hidden_size": 112, "num_attention_heads": 7, "head_dim": 96,
    },
    "SmolLM3": {
        "model_type": "smollm3", "head_dim": None, "hidden_size": 240, "no_rope_layers": [1, 0],
    },
    "Gemma": {"model_type": "gemma", "pad_token_id": 2},
    "Gemma 2": {
        "model_type": "gemma2", "sliding_window": 13, "query_pre_attn_scalar": 50,
        "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0,
    },
    "Gemma 3": {
        "model_type": "gemma3_text", "sliding_window": 13, "query_pre_attn_scalar": 50,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4},
        },
    },
    "Phi-2": {
        "model_type": "phi", "head_dim": None, "hidden_size": 240, "num_key_value_heads": 3,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.4,
        },
    },
    "Phi-2, norms on q and k": {
        "model_type": "phi", "head_dim": None, "hidden_size": 240, "qk_layernorm": True,
    },
    "Phi-3": {
        "model_type": "phi3", "head_dim": None, "hidden_size": 288, "num_key_value_heads": 3,
        "sliding_window": 13, "max_position_embeddings": 128,
    },
    "Phi-3, short factors of a long context": {
        "model_type": "phi3", "head_dim": None, "hidden_size": 240,
        "original_max_position_embeddings": 60, "rope_parameters": {
            **LONG_ROPE, "original_max_position_embeddings": 60,
        },
    },
    "Phi-3, long factors": {
        "model_type": "phi3", "head_dim": None, "hidden_size": 240,
        "original_max_position_embeddings": 4, "rope_parameters": {
            **LONG_ROPE, "original_max_position_embeddings": 4,
        },
    },
    "StarCoder2": {
        "model_type": "starcoder2", "head_dim": None, "hidden_size": 240, "sliding_window": 13,
    },
    "GPT-2": {
        "model_type": "gpt2", "head_dim": None, "hidden_size": 240, "num_key_value_heads": None,
        "intermediate_size": None,
    },
    "GPT-NeoX": {
        "model_type": "gpt_neox", "head_dim": None, "hidden_size": 240,
        "num_key_value_heads": None, "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25,
        },
    },
    "GPT-NeoX, one after the other": {
        "model_type": "gpt_neox", "head_dim": None, "hidden_size": 288,
        "num_key_value_heads": None, "use_parallel_residual": False,
    },
    "Falcon 7B": {
        "model_type": "falcon", "head_dim": None, "hidden_size": 240,
        "num_key_value_heads": None, "intermediate_size": None,
    },
    "Falcon 40B": {
        "model_type": "falcon", "head_dim": None, "hidden_size": 576, "num_attention_heads": 6,
        "num_key_value_heads": None, "num_kv_heads": 2, "intermediate_size": None,
        "new_decoder_architecture": True, "tie_word_embeddings": False,
    },
    "Falcon, one after the other": {
        "model_type": "falcon", "head_dim": None, "hidden_size": 240,
        "num_key_value_heads": None, "intermediate_size": None, "multi_query": False,
        "parallel_attn": False, "bias": True,
    },
    "OLMo 2": {"model_type": "olmo2", "head_dim": None, "hidden_size": 240},
    "Granite": {
        "model_type": "granite", "head_dim": None, "hidden_size": 240,
        "embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22,
        "attention_multiplier": 0.015625,
    },
    "Command-R": {
        "model_type": "cohere", "head_dim": None, "hidden_size": 240, "logit_scale": 0.0625,
    },
    "Command-R+": {
        "model_type": "cohere", "head_dim": None, "hidden_size": 240, "use_qk_norm": True,
    },
    "Command-R7B": {
        "model_type": "cohere2", "hidden_size": 112, "num_attention_heads": 7,
        "sliding_window": 13, "layer_types": ["sliding_attention", "full_attention"],
    },
    "StableLM": {
        "model_type": "stablelm", "head_dim": None, "hidden_size": 240, "use_qkv_bias": True,
        "num_key_value_heads": 3,
    },
    "StableLM 2 12B": {
        "model_type": "stablelm", "head_dim": None, "hidden_size": 288, "qk_layernorm": True,
        "use_parallel_residual": True,
    },
    "Mixtral": {"model_type": "mixtral", "head_dim": 96, "num_local_experts": 4},
    "Qwen3-MoE": {
        "model_type": "qwen3_moe", "num_experts": 5, "num_experts_per_tok": 2,
        "moe_intermediate_size": 40, "norm_topk_prob": True,
    },
    "Qwen3-MoE, a dense layer": {
        "model_type": "qwen3_moe", "num_experts": 5, "num_experts_per_tok": 3,
        "moe_intermediate_size": 40, "mlp_only_layers": [0],
    },
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip


def _with_vision(model_type: str, text: dict[str, Any], **values: Any) -> dict[str, Any]:
    """The case of a model that also sees images."""
    text = {name: value for name, value in {**SIZES, **text}.items() if value is not None}
    nothing = dict.fromkeys(SIZES)
    return {
        **nothing, "model_type": model_type, "text_config": text, "vision_config": VISION, **values,
    }  # fmt: skip


CASES |= {
    "Gemma 3 with images": _with_vision(
        "gemma3",
        {
            "sliding_window": 13, "query_pre_attn_scalar": 50,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        mm_tokens_per_image=4,
    ),
    "Mistral Small 3.1": _with_vision(
        "mistral3", {"model_type": "mistral", "sliding_window": None},
        tie_word_embeddings=False,
    ),
    "Ministral 3 with images": _with_vision(
        "mistral3", {"model_type": "ministral3", "rope_parameters": MINISTRAL3_ROPE},
        tie_word_embeddings=False,
    ),
}  # fmt: skip
# Served by transformers' implementations.
FALLBACK_CASES: dict[str, dict[str, Any]] = {
    "OPT": {
        "model_type": "opt", "head_dim": None, "hidden_size": 240, "word_embed_proj_dim": 240,
        "num_key_value_heads": None, "intermediate_size": None, "ffn_dim": 120,
    },
    "OLMo 3": {
        "model_type": "olmo3", "head_dim": None, "hidden_size": 240, "sliding_window": 13,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "GLM 4": {"model_type": "glm4"},
    "EXAONE 4": {
        "model_type": "exaone4", "sliding_window": 13, "head_dim": 96,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "Nemotron": {"model_type": "nemotron"},
    "Seed-OSS": {"model_type": "seed_oss"},
    "OLMoE": {
        "model_type": "olmoe", "head_dim": None, "hidden_size": 240, "num_experts": 4,
        "num_experts_per_tok": 2,
    },
}  # fmt: skip


# Further model types that transformers' implementations serve; they are tested by slow tests.
OTHER_MODEL_TYPES = (
    "afmoe", "apertus", "arcee", "biogpt", "bitnet", "codegen", "cohere2_moe", "ctrl", "cwm",
    "ernie4_5", "ernie4_5_moe", "exaone_moe", "flex_olmo", "glm", "glm4_moe", "glm4_moe_lite",
    "gpt_bigcode", "gptj", "granitemoe", "granitemoeshared", "hyperclovax", "internlm3", "jais2",
    "laguna", "mellum", "minimax_m2", "nanochat", "olmo", "persimmon", "phimoe", "qwen2_moe",
    "vaultgemma",
)  # fmt: skip


def other_config(model_type: str) -> PreTrainedConfig:
    """A tiny config of one of OTHER_MODEL_TYPES. They take what they know of these."""
    sizes = {**SIZES, "hidden_size": 240, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
    del sizes["head_dim"]
    experts = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4)
    return AutoConfig.for_model(
        model_type, **sizes, **experts, sliding_window=13, pad_token_id=2, dtype="float32"
    )


def tiny_config(case: str, **changes: Any) -> PreTrainedConfig:
    """The transformers config of a case, but for these fields."""
    values = {
        name: value
        for name, value in {**SIZES, **{**CASES, **FALLBACK_CASES}[case], **changes}.items()
        if value is not None
    }
    return AutoConfig.for_model(**{"pad_token_id": None, **values}, dtype="float32")


def architecture_of(config: PreTrainedConfig) -> str:
    """The name that checkpoints have in their config's architectures."""
    names = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES | MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return names[config.model_type]


def all_linears(config: PreTrainedConfig) -> dict[str, Any]:
    """The options of PEFT for adapters on all linears; of models with experts, on those of
    attention, of experts and of routers."""
    if config.get_text_config() is not config:
        return {"target_modules": r"model\.language_model\..*_proj"}
    if not {"num_experts", "num_local_experts"} & config.to_dict().keys():
        return {"target_modules": "all-linear"}
    return {
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "target_parameters": ["gate.weight", "experts.gate_up_proj", "experts.down_proj"],
    }


def served_linears(config: PreTrainedConfig) -> dict[str, Any]:
    """The options of PEFT for adapters on all that the engine says it serves."""
    config.architectures = [architecture_of(config)]
    spec = base_model_spec(config)
    routers = [m.path for m in spec.modules if m.path.endswith((".gate", ".router"))]
    modules = "|".join(
        re.escape(module.path)
        for module in spec.modules
        # PEFT saves adapters of Laguna's shared experts, but does not load them.
        if module.num_experts == 1
        and module.path not in routers
        and not (config.model_type == "laguna" and "shared_experts" in module.path)
    )
    return {
        "target_modules": rf"{re.escape(spec.layer_path)}\.\d+\.({modules})",
        "target_parameters": [
            *(module.path for module in spec.modules if module.num_experts > 1),
            *(f"{path}.weight" for path in routers),
        ],
    }


def write_random_model(
    config: PreTrainedConfig, directory: Path, targets: dict[str, Any]
) -> dict[str, Path]:
    """Write a random model to directory/model; returns PEFT adapters. targets: options of PEFT."""
    torch.manual_seed(0)
    model = getattr(transformers, architecture_of(config))(config)
    for parameter in model.parameters():
        _randomise(parameter)
    model.save_pretrained(directory / "model")
    adapters = {}
    for name, rank in (("small", 3), ("large", 12)):
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, task_type="CAUSAL_LM", **targets)
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
