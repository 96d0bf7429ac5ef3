"""Every architecture, tiny and random, against transformers and PEFT in float32."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from architectures import CASES, FALLBACK_CASES, tiny_config, write_tiny_model
from model_table import DOCUMENT, architecture_of, render_document
from oracle import Oracle

from loraplex import LLM, LoRARequest, SamplingParams
from loraplex.engine.models.registry import ARCHITECTURES

PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=0, detokenize=False)
# Five at least: the case with long rope factors was trained for four positions.
PROMPT_LENGTHS = (5, 13, 40)
MAX_MODEL_LEN = 60


@pytest.mark.parametrize("case", [*CASES, *FALLBACK_CASES])
def test_a_mixed_batch_equals_transformers_and_peft(case: str, tmp_path: Path, one_thread: None):
    config = tiny_config(case)
    adapters = write_tiny_model(config, tmp_path)
    rng = random.Random(0)
    prompts, names = [], []
    for length in PROMPT_LENGTHS:
        for name in (None, *adapters):
            prompts.append([rng.randrange(config.vocab_size) for _ in range(length)])
            names.append(name)
    options = {
        "dtype": "float32", "device": "cpu", "skip_tokenizer_init": True,
        "max_model_len": MAX_MODEL_LEN,
    }  # fmt: skip
    # So few tokens in a step that the long prompts come in chunks, beside others that decode.
    with LLM(
        str(tmp_path / "model"), max_num_batched_tokens=16, max_num_seqs=8, pool_bytes=1 << 23,
        **options,
    ) as llm:  # fmt: skip
        outputs = llm.generate(
            prompts,
            PARAMS,
            lora_request=[name and LoRARequest(name, str(adapters[name])) for name in names],
            use_tqdm=False,
        )
        llm.check_integrity()
    Oracle(tmp_path / "model", adapters).assert_equals(names, outputs)


def test_every_architecture_has_a_case():
    assert {architecture_of(case) for case in CASES} == ARCHITECTURES.keys()


def test_the_table_of_models_is_as_tested():
    assert DOCUMENT.read_text() == render_document(), "run python tests/support/model_table.py"
