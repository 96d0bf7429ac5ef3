"""Reads safetensors checkpoints into a model. Every tensor must find its place, and every place its
tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from loraplex.engine.models.weights import NamedPlaces, Place


class LoadableModel(Protocol):
    def named_weights(self) -> NamedPlaces: ...
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


def load_weights(model: LoadableModel, path: Path) -> None:
    """Fill the model from the directory's safetensors shards.

    Raises ValueError naming the tensors that are left over, missing or of a wrong shape.
    """
    places = dict(model.named_weights())
    leftover: list[str] = []
    for file in tqdm(checkpoint_files(path), desc="Loading weights", unit="file", leave=False):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    place = places.pop(name, None)
                    if place is not None:
                        _copy(name, tensors.get_tensor(name), place)
                    elif not model.is_ignored(name):
                        leftover.append(name)
        except SafetensorError as error:
            raise ValueError(f"{file} can't be read as safetensors: {error}") from error
    if leftover:
        raise ValueError(f"the checkpoint has tensors that the model lacks: {_some(leftover)}")
    if places:
        raise ValueError(f"the checkpoint lacks tensors of the model: {_some(list(places))}")
    model.finish_loading()


def fill_dummy_weights(model: LoadableModel, seed: int, device: torch.device) -> None:
    """Random weights of a size that keeps activations finite, for benchmarks."""
    generator = torch.Generator(device).manual_seed(seed)
    for name, place in model.named_weights():
        if not isinstance(place, torch.Tensor):
            # It quantises what it is given.
            weight = torch.empty(place.shape, device=device)
            place.copy_(weight.normal_(0.0, 0.02, generator=generator))
        elif len(place.shape) == 1 and name.endswith("norm.weight"):
            place.fill_(1.0)
        elif place.is_floating_point():
            # A scale is multiplied by integers of up to 8, or of up to 128.
            std = 0.02 / 8 if name.endswith("scales") else 0.02
            place.normal_(0.0, std, generator=generator)
        else:
            place.random_(generator=generator)
    model.finish_loading()


def _copy(name: str, tensor: torch.Tensor, place: Place) -> None:
    if tensor.shape != place.shape:
        raise ValueError(
            f"tensor {name!r} of the checkpoint has shape {tuple(tensor.shape)}, "
            f"where the model's config.json wants {tuple(place.shape)}"
        )
    place.copy_(tensor)


def _some(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(sorted(names)[:limit]) + more
