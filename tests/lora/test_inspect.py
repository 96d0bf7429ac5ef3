"""What `loraplex adapters inspect` prints."""

from __future__ import annotations

from dataclasses import replace

import torch
from safetensors.torch import load_file, save_file

from loraplex.benchmarks.synthetic_adapters import llama_spec, write_adapter
from loraplex.lora.inspect import inspect_adapter
from loraplex.lora.loader import load_adapter
from loraplex.lora.spec import LoRAModule

SPEC = llama_spec()
PAGE_BYTES = 16 * 1024


def test_report_of_an_adapter_that_fits(tmp_path):
    path = str(
        write_adapter(
            tmp_path,
            SPEC,
            rank=4,
            alpha=8,
            modules=["q_proj", "down_proj"],
            rank_pattern={"layers.1.self_attn.q_proj": 9},
            dtype=torch.float16,
        )
    )
    report = inspect_adapter(path, (SPEC, PAGE_BYTES))
    assert report.fits
    assert report.refusal is None
    assert report.num_parameters == 4 * 128 + 9 * 128 + 2 * 4 * 160
    image = load_adapter(path, SPEC, PAGE_BYTES, torch.bfloat16)
    assert report.num_pages == image.num_pages
    text = report.render()
    assert "synthetic" in text
    assert "rank 4, 9, alpha 8, scaling 2, 0.888889 (alpha / rank), 2 layers" in text
    assert "2,944 in F16" in text
    assert f"{image.num_pages} pages of 16,384" in text
    assert "fits:        the base model (LlamaForCausalLM)" in text


def test_report_tells_the_kind(tmp_path):
    modules = ["q_proj"]
    path = write_adapter(tmp_path, SPEC, rank=4, modules=modules, layers=[0], use_dora=True)
    weights = path / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"] = (
        torch.ones(64)
    )  # fmt: skip
    tensors["base_model.model.lm_head.weight"] = torch.ones(50, 64)
    save_file(tensors, weights)
    head = LoRAModule("lm_head", "lm_head", 64, 50)
    report = inspect_adapter(str(path), (replace(SPEC, head=head), PAGE_BYTES))
    assert report.fits, report.refusal
    assert report.num_parameters == 4 * 128 + 64 + 50 * 64
    assert "rank 4, alpha 4, scaling 1 (alpha / rank), 1 layer, with magnitude" in report.render()
    assert "lm_head:     replaced whole, 50 x 64" in report.render()

    path = write_adapter(tmp_path / "other", SPEC, rank=4, alora_invocation_tokens=[7, 9])
    report = inspect_adapter(str(path), (SPEC, PAGE_BYTES))
    assert "acts:        from tokens 7, 9 of the prompt on (aLoRA)" in report.render()


def test_report_without_a_base_model(tmp_path):
    path = str(write_adapter(tmp_path, SPEC, rank=4, use_rslora=True))
    report = inspect_adapter(path, None)
    assert report.fits
    assert "scaling 2 (alpha / sqrt(rank))" in report.render()
    assert "against no base model" in report.render()


def test_report_of_a_refused_adapter_still_tells_what_it_is(tmp_path):
    path = str(write_adapter(tmp_path, SPEC, rank=4))
    report = inspect_adapter(path, (llama_spec(hidden=128), PAGE_BYTES))
    assert not report.fits
    assert report.refusal is not None
    assert report.refusal in report.render()
    assert "lora_B.weight' has shape [64, 4], expected [128, 4]" in report.refusal
    assert "rank 4" in report.render()


def test_report_of_what_is_no_adapter(tmp_path):
    for path in (str(tmp_path), str(tmp_path / "nowhere")):
        report = inspect_adapter(path, (SPEC, PAGE_BYTES))
        assert not report.fits
        assert "refused:" in report.render()


def test_a_setting_that_is_not_served_is_named(tmp_path):
    report = inspect_adapter(str(write_adapter(tmp_path, SPEC, use_qalora=True)), None)
    assert not report.fits
    assert "use_qalora=True" in report.render()
