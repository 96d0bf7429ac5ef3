"""Embeddings in float32, against transformers and PEFT."""

from __future__ import annotations

import pytest
import torch
from oracle import Oracle

from loraplex import LLM, LoRARequest


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings_equal_those_of_transformers_and_peft(
    model_path, adapters, long_text_ids, pooling
):
    """In steps shorter than the prompts, which begin alike."""
    cases = [(long_text_ids[:n], name) for n in (1, 40, 150) for name in (None, "r8", "r16")]
    requests = [name and LoRARequest(name, str(adapters[name])) for _, name in cases]
    prompts = [prompt for prompt, _ in cases]
    with LLM(dtype="float32", max_num_batched_tokens=64, max_num_seqs=16) as llm:
        outputs = llm.embed(prompts, requests, use_tqdm=False, pooling=pooling)
        llm.check_integrity()
    oracle = Oracle(model_path, {name: adapters[name] for name in ("r8", "r16")})
    for (prompt, name), output in zip(cases, outputs, strict=True):
        expected = oracle.embed(prompt, name, pooling)
        assert torch.allclose(torch.tensor(output.outputs.embedding), expected, atol=1e-4)
