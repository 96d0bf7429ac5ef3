"""What is kept of adapters of one kind, and that no broken file passes for one of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loraplex.benchmarks.synthetic_adapters import llama_spec, write_adapter
from loraplex.lora import adapter_form
from loraplex.lora.adapter_form import AdapterForms
from loraplex.lora.loader import load_adapter
from loraplex.lora.spec import AdapterError

SPEC = llama_spec()


def image(path, forms):
    pages = load_adapter(path, SPEC, 8192, torch.float32, read_form=forms and forms.read)
    return pages.buffer


def test_adapters_of_one_kind_have_one_form_and_their_own_values(tmp_path):
    forms = AdapterForms(SPEC)
    paths = [write_adapter(tmp_path / f"{i}", SPEC, rank=4, seed=i) for i in range(3)]
    first, *others = [forms.read(path) for path in paths]
    assert all(form is first for form in others)
    images = [image(path, forms) for path in paths]
    assert all(torch.equal(a, image(path, None)) for a, path in zip(images, paths, strict=True))
    assert not torch.equal(images[0], images[1])


def test_other_settings_and_other_tensors_are_another_form(tmp_path):
    forms = AdapterForms(SPEC)
    paths = [
        write_adapter(tmp_path / "a", SPEC, rank=4),
        write_adapter(tmp_path / "b", SPEC, rank=4, alpha=1),
        write_adapter(tmp_path / "c", SPEC, rank=8),
        write_adapter(tmp_path / "d", SPEC, rank=4, dtype=torch.bfloat16),
    ]
    assert len({id(forms.read(path)) for path in paths}) == len(paths)
    for path in paths:
        assert torch.equal(image(path, forms), image(path, None))


@pytest.mark.parametrize("change", [-1, 1, 4096])
def test_a_file_of_another_size_is_refused(tmp_path, change):
    forms = AdapterForms(SPEC)
    forms.read(write_adapter(tmp_path / "whole", SPEC, rank=4))
    path = write_adapter(tmp_path / "broken", SPEC, rank=4)
    weights = path / "adapter_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:change] if change < 0 else data + bytes(change))
    with pytest.raises(AdapterError, match="truncated or not a safetensors file"):
        load_adapter(path, SPEC, 8192, torch.float32, read_form=forms.read)


def test_what_is_missing_is_named(tmp_path):
    path = write_adapter(tmp_path, SPEC, rank=4)
    (path / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match=r"adapter_config\.json is missing"):
        AdapterForms(SPEC).read(path)


def test_errors_are_not_kept(tmp_path):
    path = write_adapter(tmp_path, SPEC, rank=4)
    other = replace(SPEC, num_layers=1)
    forms = AdapterForms(other)
    for _ in range(2):
        with pytest.raises(AdapterError, match="the base model has 1 layers"):
            forms.read(path)


def test_the_kinds_that_are_kept_are_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(adapter_form, "MAX_FORMS", 2)
    forms = AdapterForms(SPEC)
    paths = [write_adapter(tmp_path / f"{rank}", SPEC, rank=rank) for rank in (1, 2, 3)]
    first, second, third = [forms.read(path) for path in paths]
    assert forms.read(paths[1]) is second
    assert forms.read(paths[2]) is third
    assert forms.read(paths[0]) is not first
