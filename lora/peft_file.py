"""What a PEFT adapter's weights file holds, module by module. Knows no base model."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from loraplex.lora.page_memory import Allocate, allocate_pages
from loraplex.lora.peft_config import CONFIG_FILE, WEIGHTS_FILE, PeftConfig
from loraplex.lora.spec import AdapterError

# What PEFT saves of a module, and what it is called in names of tensors.
TENSOR_KINDS = {
    "A": r"lora_A\.weight|lora_embedding_A",
    "B": r"lora_B\.weight|lora_embedding_B",
    "magnitude": r"lora_magnitude_vector(?:\.weight)?",
    "lora_bias": r"lora_B\.bias",
    "bias": r"(?:base_layer\.)?bias",
    "base": r"base_layer\.weight",
    "replacement": r"weight",
    "tokens": r"token_adapter\.trainable_tokens_delta",
}
VECTOR_NAMES = {"magnitude": "lora_magnitude_vector", "lora_bias": "lora_B.bias"}
VECTOR_KINDS = "magnitude", "lora_bias", "bias"
TENSOR_NAME = re.compile(
    r"base_model\.model\.(?P<module>.+?)\.(?:"
    + "|".join(f"(?P<{kind}>{pattern})" for kind, pattern in TENSOR_KINDS.items())
    + ")"
)
_Layout = tuple[str, list[int]]
"""A tensor's dtype and shape, as the file has them."""
SERVED_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class TargetedModule:
    """What a weights file holds for one module of the base model."""

    name: str
    """PEFT's, as in "model.layers.0.self_attn.q_proj"."""
    rank: int
    """0: it has no A and B, but a matrix that replaces the base model's, or rows of it."""
    in_features: int
    out_features: int
    scaling: float
    file_dtype: str
    tensors: Mapping[str, str]
    """Names of its tensors by kind: "A" and "B", "replacement" or "tokens", and what else there
    is."""
    num_experts: int = 1
    """More: A and B are those of all experts; see lora/experts.py."""

    @property
    def tensor_a(self) -> str:
        return self.tensors["A"]

    @property
    def tensor_b(self) -> str:
        return self.tensors["B"]

    @property
    def vectors(self) -> Mapping[str, str]:
        """Of the tensors those of [out_features]; as a rule none."""
        return {kind: name for kind, name in self.tensors.items() if kind in VECTOR_KINDS}


def not_served(tensor_name: str) -> AdapterError:
    """The error of a tensor that is nothing that we know."""
    return AdapterError(
        f"tensor {tensor_name!r} is not allowed: a LoRA adapter's tensors must be named "
        "'base_model.model.<module>.lora_A.weight' or '...lora_B.weight'; besides, magnitudes and "
        "biases of such modules are served, and matrices that replace the embedding or the head"
    )


def read_tensors(
    path: Path, entries: Mapping[str, Any], data_bytes: int, allocate: Allocate = allocate_pages
) -> Callable[[str], torch.Tensor]:
    """The tensors, by name, of a file in safetensors' format, which ends with their data.

    In one go: of a mapped file every page would be mapped, and threads wait for each other to.
    """
    with path.open("rb") as file:
        file.seek(-data_bytes, os.SEEK_END)
        data = allocate(max(data_bytes, 1))
        if file.readinto(data.numpy().data) != data_bytes:
            raise OSError("it ends before its tensors do")
    memory = data.numpy()

    def tensor(name: str) -> torch.Tensor:
        entry = entries[name]
        begin, end = entry["data_offsets"]
        dtype = SERVED_DTYPES[entry["dtype"]]
        count = (end - begin) // dtype.itemsize
        flat = torch.frombuffer(memory, dtype=dtype, count=count, offset=begin)
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
    modules: dict[str, dict[str, str]] = {}
    layouts: dict[str, _Layout] = {}
    for name in file.keys():  # noqa: SIM118 (not a dict)
        match = TENSOR_NAME.fullmatch(name)
        if match is None:
            raise not_served(name)
        kind = match.lastgroup
        assert kind is not None
        tensor = file.get_slice(name)
        layouts[name] = tensor.get_dtype(), tensor.get_shape()
        other = modules.setdefault(match["module"], {}).setdefault(kind, name)
        if other != name:
            raise AdapterError(f"tensors {other!r} and {name!r} are for the same: one is allowed")
    if not modules:
        raise AdapterError(f"{WEIGHTS_FILE} holds no tensor")
    modules = dict(_name_parameters(modules, config))
    for tensors in modules.values():
        for kind, name in tensors.items():
            if config.invocation_token_ids and kind not in "AB":
                raise AdapterError(
                    f"tensor {name!r} is not allowed beside alora_invocation_tokens: it would act "
                    "on what comes before the invocation, too"
                )
    return [_check_module(name, tensors, config, layouts) for name, tensors in modules.items()]


def _name_parameters(
    modules: Mapping[str, dict[str, str]], config: PeftConfig
) -> Iterator[tuple[str, dict[str, str]]]:
    """The modules; where it is parameters of experts that are targeted, by the names of those.

    PEFT wraps the experts once for each, in their order, and what tensors are called only tells
    how deep they are."""
    for name, tensors in modules.items():
        experts, *wrapped = name.split(".base_layer")
        if not _is_all_experts(experts):
            yield name, tensors
            continue
        parameters = config.parameters_of(experts)
        if any(wrapped) or len(wrapped) >= len(parameters):
            raise AdapterError(
                f"tensor {next(iter(tensors.values()))!r} is for a parameter that "
                f"target_parameters of {CONFIG_FILE} does not target: of {experts} it has "
                + (", ".join(parameters) or "none")
            )
        yield f"{experts}.{parameters[-1 - len(wrapped)]}", tensors


def _is_all_experts(module_name: str) -> bool:
    """Whether it is what transformers' models with experts in one parameter have them in."""
    return module_name.endswith(".experts")


def _check_module(
    name: str, tensors: dict[str, str], config: PeftConfig, layouts: Mapping[str, _Layout]
) -> TargetedModule:
    """tensors: names by kind."""
    for kind in ("replacement", "tokens"):
        if kind in tensors and len(tensors) > 1:
            other = next(tensors[other] for other in tensors if other != kind)
            raise AdapterError(
                f"tensor {tensors[kind]!r} is not allowed beside {other!r}: a module has LoRA, or "
                "a matrix or rows of its own"
            )
        if kind in tensors:
            return _check_replacement(name, tensors, layouts)
    for side in "AB":
        if side not in tensors:
            other = next(iter(tensors.values()))
            is_embedding = "lora_embedding_" in other
            own_name = f"lora_embedding_{side}" if is_embedding else f"lora_{side}.weight"
            partner = f"base_model.model.{name}.{own_name}"
            raise AdapterError(f"tensor {other!r} has no partner {partner!r}")
    sides = {side: tensors[side] for side in "AB"}
    if not config.targets(name):
        raise AdapterError(
            f"tensor {sides['A']!r} belongs to a module that target_modules of {CONFIG_FILE} "
            "does not target"
        )
    rank = config.rank_of(name)
    file_dtype, shape = layouts[sides["A"]]
    in_features, out_features = shape[-1:], layouts[sides["B"]][1][:1]
    is_all_experts = _is_all_experts(name.rpartition(".")[0])
    num_experts = max(shape[0] // rank, 1) if is_all_experts and shape else 1
    size, symbol = rank * num_experts, "num_experts * {}" if is_all_experts else "{}"
    _check_tensor(sides["A"], layouts, [size, *in_features], f"[{symbol}, in_features]", rank)
    _check_tensor(sides["B"], layouts, [*out_features, size], f"[out_features, {symbol}]", rank)
    vectors = {kind: tensors[kind] for kind in VECTOR_KINDS if kind in tensors}
    for kind, setting, is_on in (
        ("magnitude", "use_dora", config.use_dora),
        ("lora_bias", "lora_bias", config.lora_bias),
        ("bias", "bias", config.bias != "none"),
    ):
        if kind in vectors and not is_on:
            raise AdapterError(
                f"tensor {vectors[kind]!r} is not allowed: {CONFIG_FILE} has {setting} off"
            )
        # Not every linear has a bias that may have been trained.
        if kind not in vectors and is_on and kind != "bias":
            missing = f"base_model.model.{name}.{VECTOR_NAMES[kind]}"
            raise AdapterError(f"tensor {missing!r} is missing: {CONFIG_FILE} has {setting} on")
    for tensor in vectors.values():
        _check_tensor(tensor, layouts, out_features, str(out_features), rank)
    if "base" in tensors:
        _check_tensor(tensors["base"], layouts, layouts[tensors["base"]][1], "", rank)
    scaling = config.scaling_of(name)
    return TargetedModule(
        name, rank, in_features[0], out_features[0], scaling, file_dtype, tensors, num_experts
    )


def _check_replacement(
    name: str, tensors: dict[str, str], layouts: Mapping[str, _Layout]
) -> TargetedModule:
    (tensor_name,) = tensors.values()
    file_dtype, shape = layouts[tensor_name]
    if len(shape) != 2 or file_dtype not in SERVED_DTYPES:
        raise not_served(tensor_name)
    return TargetedModule(name, 0, shape[1], shape[0], 1.0, file_dtype, tensors)


def _check_tensor(
    name: str, layouts: Mapping[str, _Layout], shape: list[int], expected: str, rank: int
) -> None:
    """expected: the shape in words, {} for the rank."""
    file_dtype, file_shape = layouts[name]
    if file_dtype not in SERVED_DTYPES:
        raise AdapterError(
            f"tensor {name!r} has dtype {file_dtype}, which is not allowed: it must be one of "
            + ", ".join(SERVED_DTYPES)
        )
    if file_shape != shape:
        raise AdapterError(
            f"tensor {name!r} has shape {file_shape}, expected {expected.format(rank)}: "
            f"{CONFIG_FILE} gives this module rank {rank}"
        )
