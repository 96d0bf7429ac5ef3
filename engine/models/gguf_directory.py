"""Makes a model directory of a GGUF file: config, tokenizer, and where its tensors are.

The weights stay in the file. Everything beyond the loader meets an ordinary model directory.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from loraplex.engine.models.cache import cached_model
from loraplex.engine.models.gguf_tensors import (
    DENSE_TYPES,
    TableEntry,
    tensor_name,
    write_table,
)

logger = logging.getLogger(__name__)

_VERSION = 1
"""Part of the directory's name: raise it when the files written here change."""
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# Llama 3.1 and 3.2: files have the factors that these make of each frequency, and not them.
LLAMA3_SCALINGS = [
    {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    for factor in (8.0, 32.0)
]  # fmt: skip
ROPE_FACTORS = "rope_freqs.weight"


def gguf_directory(file: Path) -> Path:
    """The model directory of a GGUF file; made now, if the file is new or has changed.

    Raises ValueError if the file can't be read or its architecture is not supported.
    """
    file = file.resolve()
    status = file.stat()
    identity = f"{file} {status.st_size} {status.st_mtime_ns}".encode()
    digest = hashlib.sha256(identity).hexdigest()[:12]
    name = f"{file.stem}-{digest}-v{_VERSION}"
    return cached_model(name, lambda directory: _write(file, directory))


def _write(file: Path, directory: Path) -> None:
    from gguf import GGUFReader

    logger.info("Reading the header of %s (once, some seconds)", file)
    try:
        reader = GGUFReader(file)
    except (ValueError, IndexError) as error:
        raise ValueError(f"model={str(file)!r} can't be read as GGUF: {error}") from error
    architecture = reader.fields["general.architecture"].contents()
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"general.architecture={architecture!r} of {file} is not supported: it must be one of "
            + ", ".join(map(repr, ARCHITECTURES))
        )
    config = _config(file, architecture, reader.tensors)
    tensors = {
        tensor_name(tensor.name): _stored(tensor, architecture, config)
        for tensor in reader.tensors
        if tensor.name != ROPE_FACTORS
    }
    config["quantization_config"] = {
        "quant_method": "gguf",
        "types": {
            name.removesuffix(".weight"): tensor.type
            for name, tensor in tensors.items()
            if tensor.type not in DENSE_TYPES
        },
    }
    write_table(directory, file, tensors)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _write_tokenizer(file, reader, directory)


def _config(file: Path, architecture: str, tensors: Any) -> dict[str, Any]:
    from transformers import AutoConfig

    hf_config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    hf_config.architectures = [ARCHITECTURES[architecture]]
    hf_config.dtype = "bfloat16"
    for tensor in tensors:
        if tensor.name == ROPE_FACTORS:
            hf_config.rope_parameters |= _rope_scaling(hf_config, tensor.data)
    return hf_config.to_dict()


def _rope_scaling(hf_config: Any, factors: Any) -> dict[str, Any]:
    """What makes these factors, [head_dim / 2], of the frequencies of rotary positions."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = hf_config.rope_parameters
    exponents = torch.arange(len(factors)).float() / len(factors)
    frequencies = 1.0 / parameters["rope_theta"] ** exponents / torch.tensor(factors)
    for scaling in LLAMA3_SCALINGS:
        hf_config.rope_parameters = {**parameters, **scaling}
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](hf_config, torch.device("cpu"))
        if torch.allclose(scaled, frequencies, rtol=1e-3):
            return scaling
    raise ValueError(f"the factors in {ROPE_FACTORS} of the GGUF file are not those of a Llama 3")


def _stored(tensor: Any, architecture: str, config: dict[str, Any]) -> TableEntry:
    # GGUF has the size of rows first.
    num_rows = int(tensor.shape[-1])
    rotary_heads = 0
    if architecture == "llama" and ".attn_q." in tensor.name:
        rotary_heads = config["num_attention_heads"]
    elif architecture == "llama" and ".attn_k." in tensor.name:
        rotary_heads = config["num_key_value_heads"]
    return TableEntry(
        type=tensor.tensor_type.name,
        offset=int(tensor.data_offset),
        row_bytes=int(tensor.n_bytes) // num_rows,
        num_rows=num_rows,
        rotary_heads=rotary_heads,
    )


def _write_tokenizer(file: Path, reader: Any, directory: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    split = reader.fields.get("tokenizer.ggml.pre")
    if split is not None and split.contents() == SINGLE_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = single_digits()
    tokenizer.save_pretrained(directory)


SINGLE_DIGITS = "smollm"
"""The name in GGUF files of a way to split text that transformers does not know."""


def single_digits() -> Any:
    """Splits text as that name says: each digit is a token of its own."""
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
