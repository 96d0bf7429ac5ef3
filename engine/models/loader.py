"""Reads checkpoints into a model. Every tensor must find its place, and every place its
tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Protocol

import torch
from tqdm import tqdm

from loraplex.engine.models.gguf_tensors import TABLE, gguf_tensors
from loraplex.engine.models.shards import WHOLE, Shard, take_share
from loraplex.engine.models.stored_tensors import StoredTensor, read_ahead, safetensors_tensors
from loraplex.engine.models.weights import NamedPlaces, Place


class LoadableModel(Protocol):
    def named_weights(self) -> NamedPlaces: ...
    def current_name(self, name: str) -> str: ...
    def is_ignored(self, name: str) -> bool: ...
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
    # (A function of its own, so that no place outlives it: linears are about to be laid out anew.)
    _fill(model, path, shard)
    model.finish_loading()


def _fill(model: LoadableModel, path: Path, shard: Shard) -> None:
    places = dict(model.named_weights())
    leftover: list[str] = []
    found: list[tuple[str, StoredTensor, Place]] = []
    for name, stored in _stored_tensors(path):
        current_name = model.current_name(name)
        if current_name in places:
            found.append((name, stored, places.pop(current_name)))
        elif not (model.is_ignored(current_name) or _adds_nothing(name, stored)):
            leftover.append(name)
    progress = {"desc": "Loading weights", "unit": "tensor", "leave": False}
    # None: shown on a terminal, and in no log.
    with tqdm(total=len(found), disable=shard.index > 0 or None, **progress) as shown:
        for name, tensor, place in read_ahead(found):
            if tensor is not None:
                copy_to_place(name, take_share(tensor, place.shape, shard), place)
            shown.update()
    if leftover:
        raise ValueError(f"the checkpoint has tensors that the model lacks: {_some(leftover)}")
    if places:
        raise ValueError(f"the checkpoint lacks tensors of the model: {_some(list(places))}")


def _stored_tensors(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    if (path / TABLE).is_file():
        return gguf_tensors(path)
    return chain.from_iterable(map(safetensors_tensors, checkpoint_files(path)))


def fill_dummy_weights(model: LoadableModel, seed: int, device: torch.device) -> None:
    """Random weights of a size that keeps activations finite, for benchmarks."""
    generator = torch.Generator(device).manual_seed(seed)
    for name, place in model.named_weights():
        if place.shape is None:
            raise ValueError("load_format='dummy' is not allowed with this kind of checkpoint")
        if name.endswith(".g_idx"):
            continue  # GPTQ's order of inputs, which is the plain one already.
        if not isinstance(place, torch.Tensor):
            # It quantises what it is given.
            weight = torch.empty(place.shape, device=device)
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
    model.finish_loading()


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
