"""Reads adapters for a base model: whole, or refused by the name of a tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from loraplex.lora.adapter_form import AdapterForm
from loraplex.lora.ends import place_ends
from loraplex.lora.experts import place_experts, split_parts
from loraplex.lora.fusion import place_weights
from loraplex.lora.image import AdapterImage, AdapterWeights, pack_image
from loraplex.lora.merge import merge_adapters
from loraplex.lora.page_memory import Allocate, allocate_pages
from loraplex.lora.peft_config import WEIGHTS_FILE, adapter_fingerprint
from loraplex.lora.peft_file import read_tensors
from loraplex.lora.recipe import MergeRecipe, Recipe
from loraplex.lora.shards import pack_shards
from loraplex.lora.spec import AdapterError, BaseModelSpec
from loraplex.lora.vectors import add_vectors

ReadForm = Callable[[Path], AdapterForm]


def load_adapter(
    recipe: Recipe | Path,
    spec: BaseModelSpec,
    page_bytes: int,
    dtype: torch.dtype,
    allocate_image: Allocate = allocate_pages,
    allocate_file: Allocate = allocate_pages,
    read_form: ReadForm | None = None,
) -> AdapterImage:
    """Read the adapter that a recipe gives for a base model, into pages of page_bytes.

    read_form: AdapterForms' for the base model, if many adapters are read.
    The scaling goes into B, in fp32, before the one rounding to dtype.
    Raises AdapterError, naming the tensor or the setting, if any part of it cannot be served.
    """
    if isinstance(recipe, MergeRecipe):
        parts = [_read_part(path, spec, dtype, allocate_file, read_form) for path in recipe.paths]
        weights = merge_adapters(parts, recipe.merge, spec, dtype)
    else:
        weights = read_adapter(str(recipe), spec, dtype, allocate_file, read_form)
    if spec.shard is not None:
        return pack_shards(weights, spec, page_bytes, allocate_image)
    return pack_image(weights, spec, page_bytes, allocate_image)


def read_adapter(
    path: str,
    spec: BaseModelSpec,
    dtype: torch.dtype,
    allocate: Allocate = allocate_pages,
    read_form: ReadForm | None = None,
) -> AdapterWeights:
    """The tensors of the PEFT adapter in a directory, by place; see load_adapter."""
    directory = Path(path)
    fingerprint = adapter_fingerprint(path)
    form = AdapterForm.read(directory, spec) if read_form is None else read_form(directory)
    tensors = read_tensors(directory / WEIGHTS_FILE, form.entries, form.data_bytes, allocate)
    plain, of_experts = split_parts(form.parts, spec)
    weights = place_weights(plain, tensors, spec, dtype)
    place_experts(weights, of_experts, tensors, spec)
    for part in form.parts:
        if len(part.module.tensors) > 2:  # more than A and B
            add_vectors(weights, part, tensors, spec)
    weights = place_ends(weights, form.ends, tensors, spec, form.config)
    weights = replace(weights, invocation_token_ids=form.config.invocation_token_ids)
    if adapter_fingerprint(path) != fingerprint:
        raise AdapterError(f"the files in {path!r} changed while they were being read")
    return weights


def _read_part(
    path: str,
    spec: BaseModelSpec,
    dtype: torch.dtype,
    allocate: Allocate,
    read_form: ReadForm | None,
) -> AdapterWeights:
    """As read_adapter does; errors say which of several adapters is to blame."""
    try:
        return read_adapter(path, spec, dtype, allocate, read_form)
    except AdapterError as error:
        raise AdapterError(f"adapter in {path!r}: {error}", error.status) from None
