"""Reads checkpoints into a model. Every tensor must find its place, and every place its
tensor."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Protocol

import torch
from tqdm import tqdm

from loraplex.engine.models.gguf_tensors import TABLE, gguf_tensors
from loraplex.engine.models.shards import WHOLE, Shard, take_share
from loraplex.engine.models.stored_tensors import (
    StoredTensor,
    Tensors,
    read_ahead,
    safetensors_tensors,
)
from loraplex.engine.models.weights import NamedPlaces, Place
from loraplex.lora.spec import Section

AllSections = Sequence[Sequence[Section]]
"""Of each of several tensors."""


class Unit(Protocol):
    """What is loaded by itself: its memory is taken when its turn comes, and what it only needs
    until it is laid out is given back before that of the next."""

    def named_weights(self) -> NamedPlaces: ...
    def sections_of(self, name: str) -> Sequence[Section]: ...
    def finish_loading(self) -> None: ...


class LoadableModel(Protocol):
    def units(self) -> Iterable[Unit]: ...
    def current_name(self, name: str) -> str: ...
    def is_ignored(self, name: str) -> bool: ...
    def copies(self) -> Mapping[str, torch.Tensor]: ...
    def finish_loading(self) -> None: ...


def checkpoint_files(path: Path) -> list[Path]:
    """The safetensors shards of a model directory. Raises ValueError if one is missing."""
    index_path = path / "model.safetensors.index.json"
    if index_path.is_file():
        names = sorted(set(json.loads(index_path.read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    for name in names:
        if not (path / name).is_file():
            raise ValueError(
                f"model={str(path)!r} has no {name}: weights must be safetensors files"
            )
    return [path / name for name in names]


def load_weights(model: LoadableModel, path: Path, shard: Shard = WHOLE) -> None:
    """Fill the model, or a share of one, from the directory's safetensors shards or a GGUF file.

    Raises ValueError naming the tensors that are left over, missing or of a wrong shape.
    """
    stored: dict[str, tuple[str, StoredTensor]] = {}
    leftover, missing = list[str](), list[str]()
    for name, tensor in _stored_tensors(path):
        current_name = model.current_name(name)
        if current_name in stored:
            leftover.append(name)
        else:
            stored[current_name] = name, tensor
    progress = {"desc": "Loading weights", "unit": "tensor", "leave": False}
    # None: shown on a terminal, and in no log.
    with tqdm(total=len(stored), disable=shard.index > 0 or None, **progress) as shown:
        for (unit, sections), tensors in read_ahead(_units(model, stored, missing)):
            shown.update(len(tensors))
            _fill(tensors, shard, sections)
            unit.finish_loading()
    copies = [(*stored.pop(n), like) for n, like in model.copies().items() if n in stored]
    leftover += [
        name
        for current_name, (name, tensor) in stored.items()
        if not (model.is_ignored(current_name) or _adds_nothing(name, tensor))
    ]
    if leftover:
        raise ValueError(f"the checkpoint has tensors that the model lacks: {_some(leftover)}")
    if missing:
        raise ValueError(f"the checkpoint lacks tensors of the model: {_some(missing)}")
    for name, tensor, loaded in copies:
        if not torch.equal(take_share(tensor.read(), loaded.shape, shard).to(loaded), loaded):
            raise ValueError(
                f"tensor {name!r} of the checkpoint differs from the embedding, where config.json "
                "says tie_word_embeddings=true: set that to false to have it"
            )
    model.finish_loading()


def _units(
    model: LoadableModel, stored: dict[str, tuple[str, StoredTensor]], missing: list[str]
) -> Iterator[tuple[tuple[Unit, AllSections], list[tuple[str, StoredTensor, Place]]]]:
    """Each unit, the sections of its tensors, and those, taken from those stored; as soon as any
    are missing, no more."""
    for unit in model.units():
        places = dict(unit.named_weights())
        missing += places.keys() - stored.keys()
        found = [name for name in places if name in stored]
        tensors = [(*stored.pop(name), places.pop(name)) for name in found]
        if not missing:
            yield (unit, [unit.sections_of(name) for name in found]), tensors


def _fill(tensors: Tensors, shard: Shard, sections: AllSections) -> None:
    """Use up what has been read, so that no place outlives it: a unit is about to be laid out."""
    for of_tensor in sections:
        name, future, place = tensors.popleft()
        tensor = future.result()
        if tensor is not None:
            copy_to_place(name, take_share(tensor, place.shape, shard, of_tensor), place)


def _stored_tensors(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    if (path / TABLE).is_file():
        return gguf_tensors(path)
    return chain.from_iterable(map(safetensors_tensors, checkpoint_files(path)))


def fill_dummy_weights(model: LoadableModel, seed: int, device: torch.device) -> None:
    """Random weights of a size that keeps activations finite, for benchmarks."""
    generator = torch.Generator(device).manual_seed(seed)
    for unit in model.units():
        for name, place in unit.named_weights():
            _fill_randomly(name, place, generator)
        unit.finish_loading()
    model.finish_loading()


def _fill_randomly(name: str, place: Place, generator: torch.Generator) -> None:
    if place.shape is None:
        raise ValueError("load_format='dummy' is not allowed with this kind of checkpoint")
    if name.endswith(".g_idx"):
        return  # GPTQ's order of inputs, which is the plain one already.
    if not isinstance(place, torch.Tensor):
        # It quantises what it is given.
        weight = torch.empty(place.shape, device=generator.device)
        place.copy_(weight.normal_(0.0, 0.02, generator=generator))
    elif len(place.shape) == 1 and name.endswith(".weight"):
        place.fill_(1.0)
    elif place.is_floating_point():
        # What a scale is multiplied by is of the size of 8.
        std = 0.02 / 8 if "scale" in name.rpartition(".")[2] else 0.02
        # By way of float32, because float8 has no generator.
        values = torch.empty_like(place, dtype=torch.float32)
        place.copy_(values.normal_(0.0, std, generator=generator))
    else:
        place.random_(generator=generator)


def copy_to_place(name: str, tensor: torch.Tensor, place: Place) -> None:
    """Raises ValueError if the shapes differ by more than dimensions of 1."""
    if place.shape is None:
        place.copy_(tensor)
        return
    if _without_ones(tensor.shape) != _without_ones(place.shape):
        raise ValueError(
            f"tensor {name!r} of the checkpoint has shape {tuple(tensor.shape)}, "
            f"where the model's config.json wants {tuple(place.shape)}"
        )
    place.copy_(tensor.reshape(place.shape))


def _without_ones(shape: torch.Size) -> list[int]:
    return [size for size in shape if size != 1]


def _adds_nothing(name: str, stored: StoredTensor) -> bool:
    """Quantisers write biases of zeros to models that have none."""
    return name.endswith(".bias") and not stored.read().any()


def _some(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(sorted(names)[:limit]) + more
