"""Writes PEFT adapters with random weights: real files, no training.

python benchmarks/synthetic_adapters.py DIRECTORY --model MODEL --num-adapters 1000 --rank 16
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
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


def places_of(
    spec: BaseModelSpec, modules: Collection[str] | None = None
) -> Iterator[tuple[int, int]]:
    """(layer, module id) of the modules of these names; None: of all but those of experts."""
    for layer in range(spec.num_layers):
        for module_id, module in enumerate(spec.modules):
            is_chosen = module.num_experts == 1 and (modules is None or module.name in modules)
            if is_chosen and (module.layers is None or layer in module.layers):
                yield layer, module_id


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
    for layer, module_id in places_of(spec, modules):
        if layers is not None and layer not in layers:
            continue
        name, module = spec.module_path(layer, module_id), spec.modules[module_id]
        own_rank = rank
        for pattern, value in reversed(dict(rank_pattern or {}).items()):
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


def write_adapters(
    directory: str | Path,
    spec: BaseModelSpec,
    num_adapters: int,
    num_files: int = 4,
    ranks: Sequence[int] = (16,),
    modules: Sequence[str] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Path]:
    """Write adapters a0, a1, ... into the directory and return their directories.

    The ranks go round. Of each rank only num_files adapters have files of their own; the others'
    are links to them (hard ones where the file system has them), which an engine can't tell from
    files of their own.

    Raises ValueError for a module that the base model has not.
    """
    names = [module.name for module in spec.modules]
    if unknown := set(modules or ()).difference(names):
        raise ValueError(f"modules={sorted(unknown)} are not allowed: the model has {names}")
    directory = Path(directory)
    paths = [directory / f"a{index}" for index in range(num_adapters)]
    num_own = num_files * len(ranks)
    for index, path in enumerate(paths):
        if index < num_own:
            rank = ranks[index % len(ranks)]
            write_adapter(path, spec, rank, modules=modules, dtype=dtype, seed=index)
            continue
        path.mkdir(parents=True, exist_ok=True)
        for file in paths[index % num_own].iterdir():
            _link(file, path / file.name)
    return paths


def _link(target: Path, link: Path) -> None:
    link.unlink(missing_ok=True)
    try:
        link.hardlink_to(target)
    except OSError:
        link.symlink_to(os.path.relpath(target, link.parent))


def main(argv: Sequence[str] | None = None) -> int:
    from loraplex.engine.models.registry import lora_spec

    parser = argparse.ArgumentParser(description="Write PEFT adapters with random weights.")
    parser.add_argument("directory", type=Path, help="where a0, a1, ... are made")
    parser.add_argument("--model", required=True, help="base model: a directory or hub id")
    parser.add_argument("--num-adapters", type=int, default=16, help="default: %(default)s")
    parser.add_argument(
        "--rank", type=int, nargs="+", default=[16], help="several go round (default: 16)"
    )
    parser.add_argument("--modules", nargs="+", help="as in q_proj; default: all linears")
    parser.add_argument(
        "--num-files",
        type=int,
        default=4,
        help="adapters of each rank with weights of their own, to which the others are links "
        "(default: %(default)s)",
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    options = parser.parse_args(argv)
    spec, _ = lora_spec(options.model)
    paths = write_adapters(
        options.directory,
        spec,
        options.num_adapters,
        options.num_files,
        options.rank,
        options.modules,
        getattr(torch, options.dtype),
    )
    print(f"{len(paths)} adapters in {options.directory}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
