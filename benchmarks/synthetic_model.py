"""Models of a given shape without a checkpoint: config.json and a tokenizer; weights are random."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# What is not said is as in LLAMA.
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 14336,
        "vocab_size": 128_256,
        "rope_theta": 500_000.0,
        "max_position_embeddings": 8192,
        "dtype": "bfloat16",
    },
    "qwen3-8b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 4096,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 12288,
        "vocab_size": 151_936,
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": 8192,
        "dtype": "bfloat16",
    },
    "gemma-2-9b": {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "hidden_size": 3584,
        "num_hidden_layers": 42,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "intermediate_size": 14336,
        "vocab_size": 256_000,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    },
    "phi-4": {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "hidden_size": 5120,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 10,
        "intermediate_size": 17920,
        "vocab_size": 100_352,
        "rope_theta": 250_000.0,
        "max_position_embeddings": 8192,
        "original_max_position_embeddings": 8192,
        "pad_token_id": 2,
        "dtype": "bfloat16",
    },
    # Of Mixtral 8x7B, the first 12 of 32 layers: what fits on one GPU with a pool.
    "mixtral-12-layers": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": 4096,
        "num_hidden_layers": 12,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 14336,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32_000,
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": 8192,
        "dtype": "bfloat16",
    },
    # To see in seconds that everything works.
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 128,
        "vocab_size": 512,
        "rope_theta": 10_000.0,
        "max_position_embeddings": 1024,
        "dtype": "float32",
    },
}
# Checkpoints as these methods write them.
QUANTISED: dict[str, dict[str, Any]] = {
    "awq": {"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True},
    "gptq": {"quant_method": "gptq", "bits": 4, "sym": True, "desc_act": False},
}
SHAPES |= {
    f"{name}-{method}": SHAPES[name] | {"quantization_config": config | {"group_size": group_size}}
    for name, group_size in (("llama-3-8b", 128), ("tiny", 32))
    for method, config in QUANTISED.items()
}


def write_model(directory: str | Path, shape: str) -> Path:
    """Write a model of a shape in SHAPES, to be loaded with load_format="dummy", and return its
    directory. Its tokenizer has a word for every id, so that a server has text to stream."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    config = {**LLAMA, **SHAPES[shape]}
    (path / "config.json").write_text(json.dumps(config, indent=1))
    words = {f"w{token_id}": token_id for token_id in range(config["vocab_size"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    return path
