"""Makes a model directory of a GGUF file: config, tokenizer, and where its tensors are.

The weights stay in the file. Everything beyond the loader meets an ordinary model directory.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
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

_VERSION = 2
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
HEAD = "output.weight"
# By the names that both GGUF files and configs have for them.
ROPE_SCALINGS = ("none", "linear", "yarn")


def gguf_directory(file: Path) -> Path:
    """The model directory of a GGUF file; made now, if the file is new or has changed.

    file: the first one, if the model is split into several. Raises ValueError if one is missing or
    can't be read, or the architecture is not supported.
    """
    files = _parts(file)
    statuses = [(str(part), (status := part.stat()).st_size, status.st_mtime_ns) for part in files]
    digest = hashlib.sha256(str(statuses).encode()).hexdigest()[:12]
    name = f"{file.stem}-{digest}-v{_VERSION}"
    return cached_model(name, lambda directory: _write(files, directory))


def _parts(file: Path) -> list[Path]:
    """The files of a model, the first of which is given."""
    match = re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.gguf", file.name)
    if match is None:
        return [file.resolve()]
    stem, index, count = match.groups()
    if int(index) != 1:
        raise ValueError(
            f"model={str(file)!r} is one of {int(count)} parts of a GGUF file: give the first, "
            f"{stem}-00001-of-{count}.gguf"
        )
    parts = [file.with_name(f"{stem}-{i:05}-of-{count}.gguf") for i in range(1, int(count) + 1)]
    for part in parts:
        if not part.is_file():
            raise ValueError(f"model={str(file)!r} is split, and its part {part.name} is missing")
    return [part.resolve() for part in parts]


def _write(files: Sequence[Path], directory: Path) -> None:
    file = files[0]
    logger.info("Reading the header of %s (once, some seconds)", file)
    readers = [_read(part) for part in files]
    reader = readers[0]
    count = _field(reader, "split.count", 1)
    if count not in (0, len(files)):
        raise ValueError(
            f"model={str(file)!r} is one of {count} parts of a GGUF file, whose names must end in "
            f"-00001-of-{count:05}.gguf and so on"
        )
    architecture = _field(reader, "general.architecture", None)
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"general.architecture={architecture!r} of {file} is not supported: it must be one of "
            + ", ".join(map(repr, ARCHITECTURES))
        )
    stored = [(part, t) for part, own in zip(files, readers, strict=True) for t in own.tensors]
    config = _config(file, architecture, reader, {t.name: t for _, t in stored})
    tensors = {
        tensor_name(tensor.name): _stored(part, tensor, architecture, config)
        for part, tensor in stored
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
    write_table(directory, tensors)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _write_tokenizer(file, reader, directory)


def _read(file: Path) -> Any:
    from gguf import GGUFReader

    try:
        return GGUFReader(file)
    except (ValueError, IndexError) as error:
        raise ValueError(f"model={str(file)!r} can't be read as GGUF: {error}") from error


def _field(reader: Any, name: str, default: Any) -> Any:
    field = reader.fields.get(name)
    return default if field is None else field.contents()


def _config(
    file: Path, architecture: str, reader: Any, tensors: Mapping[str, Any]
) -> dict[str, Any]:
    from transformers import AutoConfig

    hf_config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    hf_config.architectures = [ARCHITECTURES[architecture]]
    hf_config.dtype = "bfloat16"
    hf_config.tie_word_embeddings = HEAD not in tensors
    hf_config.rope_parameters |= _scaling_in_fields(reader, f"{architecture}.rope.scaling.")
    if ROPE_FACTORS in tensors:
        hf_config.rope_parameters |= _rope_scaling(hf_config, tensors[ROPE_FACTORS].data)
    return hf_config.to_dict()


def _scaling_in_fields(reader: Any, prefix: str) -> dict[str, Any]:
    """The rope parameters that fields of the file give."""
    kind = _field(reader, prefix + "type", "none")
    if kind not in ROPE_SCALINGS:
        raise ValueError(
            f"{prefix}type={kind!r} of the GGUF file is not supported: it must be one of "
            + ", ".join(map(repr, ROPE_SCALINGS))
        )
    if kind == "none":
        return {}
    scaling = {"rope_type": kind, "factor": float(_field(reader, prefix + "factor", 1.0))}
    if kind == "yarn":
        trained = _field(reader, prefix + "original_context_length", None)
        if trained is None:
            raise ValueError(f"the GGUF file lacks {prefix}original_context_length")
        scaling["original_max_position_embeddings"] = int(trained)
    return scaling


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


def _stored(file: Path, tensor: Any, architecture: str, config: dict[str, Any]) -> TableEntry:
    # GGUF has the size of rows first.
    num_rows = int(tensor.shape[-1])
    rotary_heads = 0
    if architecture == "llama" and ".attn_q." in tensor.name:
        rotary_heads = config["num_attention_heads"]
    elif architecture == "llama" and ".attn_k." in tensor.name:
        rotary_heads = config["num_key_value_heads"]
    return TableEntry(
        file=str(file),
        type=tensor.tensor_type.name,
        offset=int(tensor.data_offset),
        row_bytes=int(tensor.n_bytes) // num_rows,
        num_rows=num_rows,
        rotary_heads=rotary_heads,
    )


def _write_tokenizer(file: Path, reader: Any, directory: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if _field(reader, "tokenizer.ggml.pre", None) == SINGLE_DIGITS:
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
