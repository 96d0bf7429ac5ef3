"""Where an adapter's modules are in a base model, also where one has fused what the other splits.

An adapter that was trained with one linear for q, k and v, say, serves a base model with three: all
get its A, and each its rows of B. Where it is the other way round, the A of the three lie one below
the other, and their B on the diagonal of a matrix that is zero elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from loraplex.lora.image import AdapterWeights, Place
from loraplex.lora.peft_config import MAX_RANK
from loraplex.lora.peft_file import TargetedModule, not_served
from loraplex.lora.spec import AdapterError, BaseModelSpec, LoRAModule

# The parts of fused modules, in the order of their rows.
FUSED_MODULES = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


@dataclass(frozen=True)
class Part:
    """Some outputs of an adapter's module, and where they are in the base model."""

    module: TargetedModule
    place: Place
    source: slice
    """Of the module's outputs."""
    target: slice
    """Of the outputs of the base model's module."""
    expert: int | None = None
    """The one that it is for; None: all, or there are none."""


def locate(modules: Sequence[TargetedModule], spec: BaseModelSpec) -> list[Part]:
    """Where targeted modules are in the base model. Raises AdapterError for one that does not fit,
    and for one that is there twice."""
    names = {module.name: module for module in modules}
    ids = {module.path: index for index, module in enumerate(spec.modules)}
    parts = [part for module in modules for part in _locate(module, names, ids, spec)]
    in_order = sorted(parts, key=_order)
    for part, following in pairwise(in_order):
        are_same = part.place == following.place and part.expert in (None, following.expert)
        if are_same and following.target.start < part.target.stop:
            raise AdapterError(
                f"tensor {following.module.tensor_a!r} is for outputs that "
                f"{part.module.tensor_a!r} is for, too"
            )
    return parts


def place_weights(
    parts: Sequence[Part],
    tensors: Callable[[str], torch.Tensor],
    spec: BaseModelSpec,
    dtype: torch.dtype,
) -> AdapterWeights:
    """The tensors, by name, of the parts' modules, put where they belong."""
    weights = AdapterWeights({}, {}, dtype)
    for place, here in group_by_place(parts).items():
        first, out_features = here[0], spec.modules[place[1]].out_features
        if first.target == slice(0, out_features):  # and so it is the only one
            weights.a[place] = tensors(first.module.tensor_a)
            weights.b[place] = tensors(first.module.tensor_b)[first.source]
            weights.scalings[place] = first.module.scaling
            continue
        rank = sum(part.module.rank for part in here)
        if rank > MAX_RANK:
            raise AdapterError(
                f"tensor {first.module.tensor_a!r} is for a part of {spec.module_path(*place)}, "
                f"where ranks add up to {rank}: the sum must be at most {MAX_RANK}"
            )
        weights.a[place] = torch.cat([tensors(part.module.tensor_a).float() for part in here])
        b = weights.b[place] = torch.zeros(out_features, rank)
        column = 0
        for part in here:
            columns = slice(column, column + part.module.rank)
            b[part.target, columns] = tensors(part.module.tensor_b) * part.module.scaling
            column = columns.stop
    return weights


def _order(part: Part) -> tuple[Place, int, int]:
    """That of all experts comes before those of each."""
    return part.place, -1 if part.expert is None else part.expert, part.target.start


def group_by_place(parts: Sequence[Part]) -> dict[Place, list[Part]]:
    by_place: dict[Place, list[Part]] = {}
    for part in parts:
        by_place.setdefault(part.place, []).append(part)
    return by_place


def _locate(
    module: TargetedModule,
    all_modules: Mapping[str, TargetedModule],
    ids: Mapping[str, int],
    spec: BaseModelSpec,
) -> list[Part]:
    for kind in ("replacement", "tokens", "base"):
        if kind in module.tensors:
            raise not_served(module.tensors[kind])
    name = _current_name(module.name, spec)
    match = re.fullmatch(rf"{re.escape(spec.layer_path)}\.(\d{{1,6}})\.(.+)", name)
    expert, path = (None, "") if match is None else _split_expert(match[2])
    reason = spec.refused_parts.get(path.rpartition(".")[0])
    if reason is not None:
        raise AdapterError(f"tensor {module.tensor_a!r} is not allowed: {reason}")
    outputs = match and _find_outputs(path, module, all_modules, ids, spec)
    if match is None or not outputs:
        raise AdapterError(
            f"tensor {module.tensor_a!r} is for a module that adapters of this {spec.architecture} "
            f"can't target: allowed are {', '.join(m.name for m in spec.modules)} of "
            f"{spec.layer_path}.0 to {spec.layer_path}.{spec.num_layers - 1}; the adapter may "
            "be for another architecture"
        )
    layer = int(match[1])
    if layer >= spec.num_layers or match[1] != str(layer):
        raise AdapterError(
            f"tensor {module.tensor_a!r} is for layer {match[1]}: the base model has "
            f"{spec.num_layers} layers, 0 to {spec.num_layers - 1}"
        )
    bases = [spec.modules[i] for i, _ in outputs]
    for base in bases:
        if base.layers is not None and layer not in base.layers:
            raise AdapterError(
                f"tensor {module.tensor_a!r} is for layer {layer}, which has no {base.path} in the "
                "base model"
            )
    num_experts = bases[0].num_experts
    if expert is not None and expert >= num_experts:
        raise AdapterError(
            f"tensor {module.tensor_a!r} is for expert {expert}: the base model has {num_experts}, "
            f"0 to {num_experts - 1}"
        )
    if num_experts > 1 and module.vectors:
        raise AdapterError(
            f"tensor {next(iter(module.vectors.values()))!r} is not allowed: magnitudes and biases "
            "of experts are not served"
        )
    _check_shapes(module, [(spec.modules[i], target) for i, target in outputs], expert)
    parts, row = [], 0
    for module_id, target in outputs:
        rows = slice(row, row + target.stop - target.start)
        parts.append(Part(module, (layer, module_id), rows, target, expert))
        row = rows.stop
    return parts


def _current_name(name: str, spec: BaseModelSpec) -> str:
    """What the base model calls a module of an older checkpoint's."""
    name += "."
    for old, new in spec.renamed_parts.items():
        name = name.replace(old, new)
    return name.removesuffix(".")


def _split_expert(path: str) -> tuple[int | None, str]:
    """ "mlp.experts.3.up_proj" -> (3, "mlp.experts.up_proj"); of others there is no expert."""
    match = re.fullmatch(r"(.+\.experts)\.(\d{1,6})\.(.+)", path)
    return (None, path) if match is None else (int(match[2]), f"{match[1]}.{match[3]}")


def _find_outputs(
    path: str,
    module: TargetedModule,
    all_modules: Mapping[str, TargetedModule],
    ids: Mapping[str, int],
    spec: BaseModelSpec,
) -> list[tuple[int, slice]]:
    """(module id, its outputs) in the base model, in the order of the module's; [] if it has none.

    path: the module's, inside its layer; ids: of the base model's modules, by theirs.
    """
    if path in ids:
        return [(ids[path], slice(0, spec.modules[ids[path]].out_features))]
    name = path.rpartition(".")[2]
    owner = path.removesuffix(name)
    parts = [ids.get(owner + part) for part in FUSED_MODULES.get(name, ())]
    if parts and None not in parts:
        return [(i, slice(0, spec.modules[i].out_features)) for i in parts if i is not None]
    for fused, names in FUSED_MODULES.items():
        if name in names and owner + fused in ids:
            prefix = module.name.removesuffix(name)
            known = {n: all_modules[prefix + n].out_features for n in names
                     if prefix + n in all_modules}  # fmt: skip
            fused_id = ids[owner + fused]
            widths = _widths_of_parts(names, known, spec.modules[fused_id].out_features)
            end = sum(widths[: names.index(name) + 1])
            return [(fused_id, slice(end - widths[names.index(name)], end))]
    return []


def _widths_of_parts(names: Sequence[str], known: Mapping[str, int], total: int) -> list[int]:
    """Outputs of each part of a fused module: gate is as wide as up, and k as v."""
    if len(names) == 2:
        return [total // 2] * 2
    q, k, v = names
    kv_width = known.get(k, known.get(v, (total - known.get(q, 0)) // 2))
    kv_width = max(1, min(kv_width, (total - 1) // 2))  # what leaves no room fits nowhere
    return [total - 2 * kv_width, kv_width, kv_width]


def _check_shapes(
    module: TargetedModule, outputs: Sequence[tuple[LoRAModule, slice]], expert: int | None
) -> None:
    in_features = outputs[0][0].in_features
    out_features = sum(target.stop - target.start for _, target in outputs)
    found = module.rank * module.num_experts
    size = module.rank * (outputs[0][0].num_experts if expert is None else 1)
    for tensor_name, shape, expected in (
        (module.tensor_a, [found, module.in_features], [size, in_features]),
        (module.tensor_b, [module.out_features, found], [out_features, size]),
    ):
        if shape != expected:
            names = " and ".join(base.name for base, _ in outputs)
            raise AdapterError(
                f"tensor {tensor_name!r} has shape {shape}, expected {expected}: in the base model "
                f"{names} has {in_features} inputs and {out_features} outputs"
                + (" for it" if out_features != sum(b.out_features for b, _ in outputs) else "")
            )
