"""Writes PEFT adapters with random weights: real files, no training."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from loraplex.lora.spec import BaseModelSpec, LoRAModule


def llama_spec(
    num_layers: int = 2, hidden: int = 64, kv_size: int = 32, intermediate: int = 96
) -> BaseModelSpec:
    """The modules of a Llama of this shape."""
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, kv_size),
        "self_attn.v_proj": (hidden, kv_size),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (hidden, intermediate),
        "mlp.up_proj": (hidden, intermediate),
        "mlp.down_proj": (intermediate, hidden),
    }
    modules = [LoRAModule(path.split(".")[1], path, *shape) for path, shape in shapes.items()]
    return BaseModelSpec("LlamaForCausalLM", num_layers, tuple(modules))


def adapter_tensors(
    spec: BaseModelSpec,
    rank: int,
    modules: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Tensors under PEFT's names, scaled so that B A x is about as large as x."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(spec.num_layers) if layers is None else layers:
        for module_id, module in enumerate(spec.modules):
            if modules is not None and module.name not in modules:
                continue
            name = spec.module_path(layer, module_id)
            own_rank = rank
            for pattern, value in reversed((rank_pattern or {}).items()):
                if re.match(rf"(.*\.)?({pattern})$", name):
                    own_rank = value
            a = torch.randn(own_rank, module.in_features, generator=generator)
            b = torch.randn(module.out_features, own_rank, generator=generator)
            prefix = f"base_model.model.{name}"
            tensors[f"{prefix}.lora_A.weight"] = (a * module.in_features**-0.5).to(dtype)
            tensors[f"{prefix}.lora_B.weight"] = (b * own_rank**-0.5).to(dtype)
    return tensors


def write_adapter(
    path: str | Path,
    spec: BaseModelSpec,
    rank: int = 8,
    alpha: float | None = None,
    modules: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    tensors: Mapping[str, torch.Tensor] | None = None,
    **config: Any,
) -> Path:
    """Write an adapter for a base model and return its directory.

    alpha is the rank unless given; modules (names) and layers default to all; config adds to
    adapter_config.json or replaces (alpha_pattern, use_rslora, ...); tensors replace the random
    ones.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "synthetic",
        "r": rank,
        "lora_alpha": rank if alpha is None else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(modules or (module.name for module in spec.modules)),
        "rank_pattern": dict(rank_pattern or {}),
        "alpha_pattern": {},
        "use_rslora": False,
        "inference_mode": True,
    }
    if layers is not None:
        values["layers_to_transform"] = list(layers)
    (path / "adapter_config.json").write_text(json.dumps(values | config, indent=2))
    if tensors is None:
        tensors = adapter_tensors(spec, rank, modules, layers, rank_pattern, dtype, seed)
    save_file(dict(tensors), path / "adapter_model.safetensors", metadata={"format": "pt"})
    return path
