"""What the engine needs to know of a checkpoint's config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def read_model_config(path: Path) -> Any:
    """The transformers config of a local model directory; its text_config if it has several.

    Raises ValueError if there is none, or none that transformers understands.
    """
    if not (path / "config.json").is_file():
        raise ValueError(f"model={str(path)!r} has no config.json: it is not a model directory")
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, KeyError, ValueError, StrictDataclassError) as error:
        raise ValueError(f"config.json of model={str(path)!r} can't be read: {error}") from error
    text_config = config.get_text_config()
    if text_config is not config:
        # What is said of all parts.
        for name in ("architectures", "dtype", "quantization_config"):
            if getattr(config, name, None) is not None:
                setattr(text_config, name, getattr(config, name))
    return text_config


def resolve_dtype(requested: str, config: Any) -> torch.dtype:
    """The dtype to run in: what the user asked for, or the checkpoint's; float32 if that says
    nothing, as some older ones.

    float16 checkpoints run in bfloat16, whose range holds theirs.
    """
    if requested != "auto":
        return DTYPES[requested]
    dtype = config.dtype or torch.float32
    if dtype == torch.float16:
        return torch.bfloat16
    if dtype not in DTYPES.values():
        raise ValueError(
            f"dtype='auto' found {dtype} in the checkpoint, which is not supported: "
            f"choose one of {', '.join(DTYPES)}"
        )
    return dtype


def resolve_kv_dtype(requested: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the KV cache of a model that runs in `dtype`."""
    return torch.float8_e4m3fn if requested == "fp8" else dtype


def declared(config: Any, field: str) -> Any:
    """The value of a field, or None if the architecture has no such field: its config.json may have
    one all the same, which then means nothing."""
    return getattr(config, field, None) if hasattr(type(config), field) else None


def max_positions(config: Any) -> int:
    """How long a request may be: as config.json says, or as YaRN makes of what it was trained for.

    Raises ValueError if it says nothing.
    """
    positions: int | None = getattr(config, "max_position_embeddings", None)
    if positions is None:
        raise ValueError(
            f"architectures={config.architectures!r} of this model is not supported: its "
            "config.json has no max_position_embeddings, as those of models with ALiBi"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "yarn":
        positions = max(positions, int(rope["factor"] * rope["original_max_position_embeddings"]))
    return positions


def head_dim(config: Any) -> int:
    """Elements of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def num_kv_heads(config: Any) -> int:
    """Heads of keys and values."""
    if not getattr(config, "new_decoder_architecture", True):  # Falcon 7B
        return 1 if config.multi_query else config.num_attention_heads
    names = "num_key_value_heads", "num_kv_heads", "num_attention_heads"
    return next(value for name in names if (value := getattr(config, name, None)))
