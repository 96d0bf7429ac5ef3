"""Embeddings on a device whose hidden state of a token is (its id, 1)."""

from __future__ import annotations

import numpy as np
import pytest
from fake_device import fake_core, make_request, run_to_end

from loraplex.engine.llm import LLM
from loraplex.engine.messages import FinishReason
from loraplex.engine.sampling_params import SamplingParams


def embedding_of(outputs) -> list[float]:
    (output,) = outputs
    assert output.finish_reason is FinishReason.LENGTH
    return np.frombuffer(output.embedding, np.float32).tolist()


def pooled(request_id: str, prompt: list[int], pooling: str, **options):
    return make_request(request_id, prompt, 1, pooling=pooling, **options)


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_prompts_longer_than_a_step_beside_others_and_cached_ones(steps_ahead):
    core = fake_core(100, steps_ahead=steps_ahead)
    prompt = list(range(1, 51))
    for turn in range(2):
        core.add_request(make_request(f"other{turn}", prompt, 3))
        core.add_request(pooled(f"mean{turn}", prompt, "mean"))
        core.add_request(pooled(f"last{turn}", prompt, "last", adapter="a" if turn else None))
        outputs = run_to_end(core)
        assert embedding_of(outputs[f"mean{turn}"]) == [25.5, 1.0]
        assert embedding_of(outputs[f"last{turn}"]) == [50.0, 1.0]
        assert all(o.embedding is None for o in outputs[f"other{turn}"])


def test_a_preemption_counts_no_token_twice():
    core = fake_core(100)
    core.add_request(pooled("r", list(range(1, 41)), "mean"))
    core.step()
    core._scheduler._preempt(core._scheduler._running[0])
    assert embedding_of(run_to_end(core)["r"]) == [20.5, 1.0]


def test_offline_embeddings_have_length_one():
    llm = LLM.from_core(fake_core(100), None)
    outputs = llm.embed([[3, 4, 8], [3, 4, 8]], use_tqdm=False, pooling="mean")
    for output in outputs:
        assert output.prompt_token_ids == [3, 4, 8]
        assert np.allclose(output.outputs.embedding, np.array([5, 1]) / np.sqrt(26))


@pytest.mark.parametrize("options", [{"pooling": "max"}, {"pooling": "last", "n": 2}])
def test_mistakes_are_named(options):
    with pytest.raises(ValueError, match="is not allowed: it must be"):
        SamplingParams(**options)
