"""The GPU runner's host half, on the CPU: what it stages, pads and reads back, a step ahead.

Streams and events are stood in for, since here everything happens at once; the LoRA kernels, by the
CPU's on the same items. The kernels themselves and graphs are tested on a device, in tests/gpu.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from loraplex import LLM, LoRARequest, SamplingParams
from loraplex.benchmarks.synthetic_adapters import write_adapter
from loraplex.benchmarks.synthetic_model import write_model
from loraplex.engine.models.registry import lora_spec
from loraplex.engine.runner import device as device_module
from loraplex.engine.runner import gpu_runner
from loraplex.lora import ops
from loraplex.lora.layers import CudaLoRABatch

VOCAB_SIZE = 512
LENGTHS = [1, 2, 17, 64, 150, 333]


class DoneEvent:
    """torch.cuda.Event where nothing is asynchronous."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


def add_on_cpu(self: CudaLoRABatch, y, x, linear) -> None:
    """CudaLoRABatch.add by the CPU's kernels: each item is a segment."""
    num_items = int(self.num_items)
    if num_items == 0 or not linear.module_mask & self.module_mask:
        return
    items = self.items[:num_items]
    assert items[0, 0] == 0
    assert torch.equal(items[1:, 0], items[:-1, 1]), "items follow one another"
    indptr = torch.cat([items[:1, 0], items[:, 1]])
    firsts = items[:, 2].tolist()
    most = max(end - begin for begin, end in pairwise([*sorted(set(firsts)), len(self.pages)]))
    tables = torch.stack([self.pages[np.arange(f, f + most) % len(self.pages)] for f in firsts])
    shrunk = self.shrunk.new_empty(len(x), len(linear.modules), 256)
    where = self.pool, indptr, tables, linear.layer, linear.modules, self.num_modules
    ops.shrink(shrunk, x, *where)
    ops.expand(y, shrunk, *where, linear.offsets)


@pytest.fixture
def on_gpu_runner(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[gpu_runner.GpuModelRunner]]:
    """Engines of the CPU get a GPU runner; the list of those that were made."""
    runners = []

    def make(model, hf_config, spec, backend, memory, block_size, kv_dtype):
        runner = gpu_runner.GpuModelRunner(
            model, hf_config, spec, backend, block_size, kv_dtype, 32, 256,
            max_pool_pages=len(memory),
        )  # fmt: skip
        runner.attach_pool(memory)
        runners.append(runner)
        return runner

    class AheadDevice(device_module.TorchDevice):
        steps_ahead = property(lambda self: 1, lambda self, value: None)

    for name in ("zeros", "empty"):
        plain = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda *sizes, plain=plain, pin_memory=False, **kw: plain(*sizes, **kw)
        )
    monkeypatch.setattr(torch.cuda, "Event", DoneEvent)
    monkeypatch.setattr(CudaLoRABatch, "add", add_on_cpu)
    monkeypatch.setattr(device_module, "ModelRunner", make)
    monkeypatch.setattr(device_module, "TorchDevice", AheadDevice)
    yield runners


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), "tiny")


@pytest.fixture(scope="module")
def adapters(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    spec, _ = lora_spec(str(model_path))
    directory = tmp_path_factory.mktemp("adapters")
    modules = {"r1": ["q_proj", "v_proj"], "r12": ["down_proj"]}
    ranks = {"r1": 1, "r12": 12, "r16": 16, "r64": 64}
    return {
        name: str(
            write_adapter(
                directory / name,
                spec,
                rank=rank,
                modules=modules.get(name),
                seed=rank,
                alpha=4 * rank,
            )
        )
        for name, rank in ranks.items()
    }


def generate(
    model_path: Path, adapters: dict[str, str], kv_cache_dtype: str = "auto", **params
) -> list[tuple]:
    """Each request's tokens and log-probabilities."""
    generator = torch.Generator().manual_seed(1)
    cases = [
        (torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist(), name)
        for length in LENGTHS
        for name in [None, *adapters]
    ]
    sampling = SamplingParams(max_tokens=12, ignore_eos=True, **params)
    with LLM(
        str(model_path), device="cpu", skip_tokenizer_init=True, load_format="dummy",
        attention_backend="reference", max_num_seqs=32, max_num_batched_tokens=256,
        pool_bytes=8 << 20, kv_cache_dtype=kv_cache_dtype,
    ) as llm:  # fmt: skip
        outputs = llm.generate(
            [prompt for prompt, _ in cases],
            sampling,
            lora_request=[name and LoRARequest(name, adapters[name]) for _, name in cases],
            use_tqdm=False,
        )
        llm.check_integrity()
    completions = [output.outputs[0] for output in outputs]
    return [(completion.token_ids, completion.logprobs) for completion in completions]


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0},
        {"temperature": 0.8, "top_p": 0.9, "seed": 1},
        {"temperature": 0, "repetition_penalty": 1.3, "logprobs": 2, "prompt_logprobs": 1},
        {"temperature": 0, "kv_cache_dtype": "fp8"},
    ],
)
@pytest.mark.parametrize("max_graph_prefill", [0, 1 << 17])
def test_tokens_are_those_of_the_cpu_runner(
    monkeypatch, request, model_path, adapters, params, max_graph_prefill
):
    expected = generate(model_path, adapters, **params)
    runners = request.getfixturevalue("on_gpu_runner")
    monkeypatch.setattr(gpu_runner, "MAX_GRAPH_PREFILL", max_graph_prefill)
    results = generate(model_path, adapters, **params)
    assert len(runners) == 1
    for (token_ids, logprobs), (expected_ids, expected_logprobs) in zip(
        results, expected, strict=True
    ):
        assert token_ids == expected_ids
        for found, wanted in zip(logprobs or [], expected_logprobs or [], strict=True):
            assert found.keys() == wanted.keys()
            for token_id, logprob in found.items():
                assert logprob.logprob == pytest.approx(wanted[token_id].logprob, abs=1e-4)


def test_buckets():
    assert gpu_runner.graph_buckets(1) == [1]
    assert gpu_runner.graph_buckets(20) == [1, 2, 4, 8, 16, 20]
    buckets = gpu_runner.graph_buckets(8192)
    assert buckets[-1] == gpu_runner.MAX_GRAPH_TOKENS
    assert buckets == sorted(set(buckets))
    for smaller, larger in pairwise(buckets):
        assert larger - smaller <= max(8, smaller // 4, 2), "an eighth is computed in vain"
