"""A pool with room for about three adapters and little KV, and many more of both wanted."""

from __future__ import annotations

import sys

import pytest

from loraplex import LLM, EngineConfig, LoRARequest, SamplingParams
from loraplex.benchmarks.synthetic_adapters import write_adapter
from loraplex.engine.models.registry import lora_spec

MAX_MODEL_LEN = 112
RANK = 8


def press(tmp_path, long_text_ids, num_adapters: int, num_requests: int) -> dict[str, float]:
    """Run the requests relaxed and pressed, and compare. Every third request is of one hot
    adapter. Returns figures."""
    spec, page_bytes = lora_spec(EngineConfig().model, dtype="float32")
    names = [f"a{i}" for i in range(num_adapters)]
    for i, name in enumerate(names):
        write_adapter(tmp_path / name, spec, rank=RANK, modules=["q_proj", "v_proj"], seed=i)
    prompts, loras = [], []
    for i in range(num_requests):
        start = (i * 37) % (len(long_text_ids) - 60)
        prompts.append(long_text_ids[start : start + 10 + i % 50])
        name = "a0" if i % 3 == 0 else names[i % num_adapters]
        loras.append(LoRARequest(name, str(tmp_path / name)))
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    options = {"dtype": "float32", "max_model_len": MAX_MODEL_LEN, "max_num_seqs": 64}
    with LLM(**options) as llm:
        relaxed = llm.generate(prompts, params, lora_request=loras, use_tqdm=False)
        assert llm.stats()["adapter_evictions"] == 0
    adapter_pages = 3 * 6
    with LLM(**options, pool_bytes=(1 + adapter_pages + 12) * page_bytes) as llm:
        pressed = llm.generate(prompts, params, lora_request=loras, use_tqdm=False)
        llm.check_integrity()
        stats = llm.stats()
    assert [o.outputs[0].token_ids for o in pressed] == [o.outputs[0].token_ids for o in relaxed]
    assert stats["adapter_evictions"] > 0
    assert stats["preemptions"] > 0
    waits = {"hot": 0.0, "others": 0.0}
    for request, output in zip(loras, pressed, strict=True):
        key = "hot" if request.lora_name == "a0" else "others"
        metrics = output.metrics
        waits[key] = max(waits[key], metrics.first_scheduled_time - metrics.arrival_time)
    whole = max(o.metrics.finished_time - o.metrics.arrival_time for o in pressed)
    return {
        "worst_wait_hot_s": waits["hot"],
        "worst_wait_others_s": waits["others"],
        "whole_s": whole,
        "preemptions": stats["preemptions"],
        "adapter_evictions": stats["adapter_evictions"],
        "adapter_loads": stats["adapter_loads"],
    }


def test_pressure_changes_no_token(tmp_path, long_text_ids):
    press(tmp_path, long_text_ids, num_adapters=12, num_requests=36)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_200_adapters_400_requests(tmp_path, long_text_ids, capsys):
    figures = press(tmp_path, long_text_ids, num_adapters=200, num_requests=400)
    with capsys.disabled():
        sys.stdout.write(f"\npressure: {figures}\n")
    # The hot adapter has a third of all requests: it waits for the others, not they for it.
    assert figures["worst_wait_others_s"] < figures["worst_wait_hot_s"]
