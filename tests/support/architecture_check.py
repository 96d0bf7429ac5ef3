"""Runs a tiny model of an architecture, with adapters, and compares it with the oracle."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from architectures import SIZES, write_random_model
from oracle import Oracle
from transformers import PreTrainedConfig

from loraplex import LLM, LoRARequest, SamplingParams

PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=0, detokenize=False)
# Five at least: the case with long rope factors was trained for four positions.
PROMPT_LENGTHS = (5, 13, 40)
MAX_MODEL_LEN = 60


def check_model(
    config: PreTrainedConfig, targets: dict[str, Any], directory: Path, device: str
) -> None:
    """check_batch of a random model, in a directory that must be empty. targets: PEFT's options of
    the adapters."""
    check_batch(directory / "model", write_random_model(config, directory, targets), device)


def check_batch(
    model: Path, adapters: dict[str, Path], device: str, oracle: Path | None = None, **options: Any
) -> None:
    """Greedy tokens and log-probabilities of a batch that mixes the base model with adapters, in
    float32, are those of transformers and PEFT. oracle: the model that they are given, if it is
    another; options: of the LLM."""
    rng = random.Random(0)
    prompts, names = [], []
    for length in PROMPT_LENGTHS:
        for name in (None, *adapters):
            prompts.append([rng.randrange(SIZES["vocab_size"]) for _ in range(length)])
            names.append(name)
    # So few tokens in a step that the long prompts come in chunks, beside others that decode.
    with LLM(
        str(model), dtype="float32", device=device, max_num_batched_tokens=16,
        max_num_seqs=8, max_model_len=MAX_MODEL_LEN, pool_bytes=1 << 23, skip_tokenizer_init=True,
        **options,
    ) as llm:  # fmt: skip
        outputs = llm.generate(
            prompts,
            PARAMS,
            lora_request=[name and LoRARequest(name, str(adapters[name])) for name in names],
            use_tqdm=False,
        )
        llm.check_integrity()
    Oracle(oracle or model, adapters).assert_equals(names, outputs)
