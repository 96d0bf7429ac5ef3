"""The tensors of GGUF files under the names that checkpoints of Hugging Face give them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from loraplex.engine.models.stored_tensors import StoredTensor

TABLE = "gguf.json"
"""In a model directory: what is where in the GGUF file, or in those that it is split into. Their
own headers take seconds to read, most of them for the vocabulary."""

_MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Elements are values, not blocks.
DENSE_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
EMBEDDING = "model.embed_tokens.weight"
# Of the embedding, expanded at a time.
EXPANDED_ROWS = 4096


@dataclass(frozen=True, slots=True)
class TableEntry:
    """Where a tensor is. Its rows are outputs of a linear, or elements of a vector."""

    file: str
    type: str
    """As GGUF names it, e.g. "Q4_K"."""
    offset: int
    row_bytes: int
    num_rows: int
    rotary_heads: int
    """Not 0: rows belong to so many heads, whose rotary dimensions are in the order of GGUF."""


def tensor_name(gguf_name: str) -> str:
    """E.g. "blk.3.attn_q.weight" -> "model.layers.3.self_attn.q_proj.weight".

    Raises ValueError for a tensor that is not of a Llama or Qwen.
    """
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", gguf_name)
    if match is None or match[2] not in _MODULES:
        raise ValueError(f"the GGUF file has a tensor that is not expected: {gguf_name!r}")
    layer, kind, end = match.groups()
    prefix = "" if layer is None else f"model.layers.{layer}."
    return f"{prefix}{_MODULES[kind]}.{end}"


def split_rotary_halves(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of each head from GGUF's order to ours; [num_heads * head_dim, ...] both.

    GGUF's Llamas pair rotary dimensions as neighbours (0, 1), Hugging Face as halves
    (0, head_dim / 2).
    """
    pairs = rows.unflatten(0, (num_heads, -1, 2))
    return pairs.transpose(1, 2).reshape(rows.shape)


def write_table(directory: Path, tensors: dict[str, TableEntry]) -> None:
    table = {name: asdict(entry) for name, entry in tensors.items()}
    (directory / TABLE).write_text(json.dumps(table))


def gguf_tensors(directory: Path) -> Iterator[tuple[str, StoredTensor]]:
    """Every tensor that the directory's table lists.

    What is stored in blocks comes as such, uint8 [rows, bytes], except for the embedding, which is
    expanded to bfloat16. Raises ValueError if a file is gone.
    """
    table = json.loads((directory / TABLE).read_text())
    entries = {name: TableEntry(**fields) for name, fields in table.items()}
    for file in {entry.file for entry in entries.values()}:
        if not Path(file).is_file():
            raise ValueError(f"model={str(directory)!r} was made from {file!r}, which is gone")
    for name, entry in entries.items():
        size, decode = entry.num_rows * entry.row_bytes, partial(_decode, name, entry)
        yield name, StoredTensor(Path(entry.file), entry.offset, size, decode)


def _decode(name: str, entry: TableEntry, data: torch.Tensor) -> torch.Tensor:
    rows = data.view(entry.num_rows, entry.row_bytes)
    if entry.rotary_heads:
        rows = split_rotary_halves(rows, entry.rotary_heads)
    if entry.type in DENSE_TYPES:
        return rows.view(DENSE_TYPES[entry.type])
    return _expand(rows, entry.type) if name == EMBEDDING else rows


def _expand(rows: torch.Tensor, type_name: str) -> torch.Tensor:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    chunks = [
        torch.from_numpy(dequantize(chunk.numpy(), GGMLQuantizationType[type_name])).bfloat16()
        for chunk in rows.split(EXPANDED_ROWS)
    ]
    return torch.cat(chunks)
