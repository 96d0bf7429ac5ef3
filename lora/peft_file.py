"""What a PEFT adapter's weights file holds, module by module. Knows no base model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from loraplex.lora.image import allocate_pages
from loraplex.lora.peft_config import CONFIG_FILE, WEIGHTS_FILE, PeftConfig
from loraplex.lora.spec import AdapterError

TENSOR_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
SERVED_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class TargetedModule:
    """What a weights file holds for one module of the base model."""

    name: str
    """PEFT's, as in "model.layers.0.self_attn.q_proj"."""
    rank: int
    in_features: int
    out_features: int
    scaling: float
    file_dtype: str

    @property
    def tensor_a(self) -> str:
        return f"base_model.model.{self.name}.lora_A.weight"

    @property
    def tensor_b(self) -> str:
        return f"base_model.model.{self.name}.lora_B.weight"


def read_tensors(path: Path) -> Callable[[str], torch.Tensor]:
    """The tensors, by name, of a file that safetensors has found valid (its format: a header's size
    in 8 bytes, the header in JSON, the data).

    In one go: of a mapped file every page would be mapped, and threads wait for each other to.
    """
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))
        num_bytes = max(entry["data_offsets"][1] for entry in header.values() if "shape" in entry)
        data = allocate_pages(num_bytes)
        if file.readinto(data.numpy().data) != num_bytes:
            raise OSError("it ends before its tensors do")

    def tensor(name: str) -> torch.Tensor:
        entry = header[name]
        begin, end = entry["data_offsets"]
        dtype = SERVED_DTYPES[entry["dtype"]]
        count = (end - begin) // dtype.itemsize
        flat = torch.frombuffer(data.numpy(), dtype=dtype, count=count, offset=begin)
        return flat.view(entry["shape"])

    return tensor


@contextmanager
def open_weights(directory: Path) -> Iterator[Any]:
    """The weights file, opened; AdapterError if it is missing or broken."""
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        hint = ""
        if (directory / "adapter_model.bin").exists():
            hint = ": adapter_model.bin is there, but pickled weights are not read"
        raise AdapterError(f"{WEIGHTS_FILE} is missing in adapter path {str(directory)!r}{hint}")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{path} cannot be read: it is truncated or not a safetensors file ({error})"
        ) from None


def read_targeted_modules(file: Any, config: PeftConfig) -> list[TargetedModule]:
    """The modules that a weights file has tensors for, in its order; reads no tensor's data.

    Raises AdapterError if the tensors are not exactly LoRA pairs as the configuration says.
    """
    modules: dict[str, dict[str, Any]] = {}
    for name in file.keys():  # noqa: SIM118 (not a dict)
        match = TENSOR_NAME.fullmatch(name)
        if match is None:
            raise AdapterError(
                f"tensor {name!r} is not allowed: a LoRA adapter's tensors must be named "
                "'base_model.model.<module>.lora_A.weight' or '...lora_B.weight'"
            )
        modules.setdefault(match["module"], {})[match["side"]] = file.get_slice(name)
    if not modules:
        raise AdapterError(f"{WEIGHTS_FILE} holds no tensor")
    return [_pair(name, sides, config) for name, sides in modules.items()]


def _pair(name: str, sides: dict[str, Any], config: PeftConfig) -> TargetedModule:
    tensors = {side: f"base_model.model.{name}.lora_{side}.weight" for side in "AB"}
    for side, other in ("AB", "BA"):
        if side not in sides:
            raise AdapterError(f"tensor {tensors[other]!r} has no partner {tensors[side]!r}")
    if not config.targets(name):
        raise AdapterError(
            f"tensor {tensors['A']!r} belongs to a module that target_modules of {CONFIG_FILE} "
            "does not target"
        )
    rank = config.rank_of(name)
    for side, tensor_name in tensors.items():
        file_dtype, shape = sides[side].get_dtype(), sides[side].get_shape()
        if file_dtype not in SERVED_DTYPES:
            raise AdapterError(
                f"tensor {tensor_name!r} has dtype {file_dtype}, which is not allowed: it must be "
                f"one of {', '.join(SERVED_DTYPES)}"
            )
        if len(shape) != 2 or shape[0 if side == "A" else 1] != rank:
            expected = f"[{rank}, in_features]" if side == "A" else f"[out_features, {rank}]"
            raise AdapterError(
                f"tensor {tensor_name!r} has shape {shape}, expected {expected}: {CONFIG_FILE} "
                f"gives this module rank {rank}"
            )
    in_features, out_features = sides["A"].get_shape()[1], sides["B"].get_shape()[0]
    file_dtype = sides["A"].get_dtype()
    scaling = config.scaling_of(name)
    return TargetedModule(name, rank, in_features, out_features, scaling, file_dtype)
