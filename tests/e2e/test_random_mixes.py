"""Random requests of every kind, in a pool that is too small for them, while adapters are swapped:
each gets what it gets alone."""

from __future__ import annotations

import random
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_model import VOCAB_SIZE, write_peft_adapter, write_tiny_model
from tiny_tokenizer import write_tokenizer

from loraplex import EngineConfig, LoRARequest, SamplingParams, StructuredOutputsParams
from loraplex.engine.core import EngineCore
from loraplex.engine.messages import EngineOutput, EngineRequest

EOS = 200
MAX_MODEL_LEN = 160
# Of the tiny model, in float32: layers, keys and values, heads and their size.
PAGE_BYTES_OF_A_TOKEN = 3 * 2 * 2 * 16 * 4
STRUCTURES = [
    StructuredOutputsParams(regex="[a-c]{3,9}"),
    StructuredOutputsParams(choice=["abc", "de"]),
    StructuredOutputsParams(json={"type": "object", "properties": {"a": {"type": "integer"}}}),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = write_tiny_model(tmp_path_factory.mktemp("model"), eos_token_id=EOS)
    return write_tokenizer(path, EOS)


@pytest.fixture(scope="module")
def loras(model, tmp_path_factory) -> list[LoRARequest]:
    root = tmp_path_factory.mktemp("adapters")
    for i in range(4):
        write_peft_adapter(model, root / f"a{i}", seed=i, r=(4, 8)[i % 2], use_dora=i == 3)
    named = [LoRARequest(f"a{i}", str(root / f"a{i}")) for i in range(4)]
    return [*named, LoRARequest("half", str(root / "a1"), scale=0.5)]


def make_params(rng: random.Random) -> SamplingParams:
    if rng.random() < 0.08:
        return SamplingParams(pooling=rng.choice(["last", "mean"]), temperature=0)
    options: dict[str, Any] = {"temperature": 0, "max_tokens": rng.choice([1, 5, 20, 40])}
    unlikely = [
        (0.2, {"temperature": rng.choice([0.3, 1.0]), "top_p": 0.9, "top_k": rng.choice([0, 5])}),
        (0.2, {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": -0.5}),
        (0.2, {"logprobs": rng.choice([0, 3])}),
        (0.1, {"prompt_logprobs": rng.choice([0, 2])}),
        (0.1, {"logit_bias": {rng.randrange(VOCAB_SIZE): 5.0}}),
        (0.1, {"stop_token_ids": [rng.randrange(VOCAB_SIZE) for _ in range(9)]}),
    ]
    for probability, more in unlikely:
        if rng.random() < probability:
            options |= more
    if rng.random() < 0.15:
        return SamplingParams(**options, structured_outputs=rng.choice(STRUCTURES))
    return SamplingParams(**options, ignore_eos=rng.random() < 0.3)


def make_requests(rng: random.Random, loras: list[LoRARequest], number: int) -> list[EngineRequest]:
    """Half of their prompts begin alike."""
    beginning = [rng.randrange(VOCAB_SIZE) for _ in range(80)]
    requests = []
    for i in range(number):
        prompt = beginning[: rng.randrange(80)] if rng.random() < 0.5 else []
        prompt = prompt + [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, 40))]
        params = make_params(rng)
        requests.append(
            EngineRequest(
                request_id=str(i),
                prompt_token_ids=prompt,
                sampling_params=params,
                max_tokens=1 if params.pooling else params.max_tokens or 1,
                eos_token_ids=[EOS],
                seed=i,
                lora_request=rng.choice([None, *loras]),
            )
        )
    return requests


def make_core(model: Path, **options: Any) -> EngineCore:
    return EngineCore(
        EngineConfig(
            model=str(model), device="cpu", dtype="float32", max_model_len=MAX_MODEL_LEN, **options
        )
    )


def run(core: EngineCore, outputs: dict[str, list[EngineOutput]]) -> None:
    """One step, whose outputs are added."""
    for output in core.step():
        outputs.setdefault(output.request_id, []).append(output)
    core.wait_for_work(0.01)


def assert_same(alone: list[EngineOutput], mixed: list[EngineOutput]) -> None:
    def tokens(outputs):
        return [token_id for output in outputs for token_id in output.new_token_ids]

    assert tokens(mixed) == tokens(alone)
    end, expected = mixed[-1], alone[-1]
    assert (end.finish_reason, end.stop_reason) == (expected.finish_reason, expected.stop_reason)
    assert end.error == expected.error
    for field in ("logprobs", "prompt_logprobs"):
        got, wanted = (
            [entry for output in outputs for entry in getattr(output, field) or ()]
            for outputs in (mixed, alone)
        )
        assert len(got) == len(wanted)
        for one, other in zip(got, wanted, strict=True):
            assert sorted(one.token_ids) == sorted(other.token_ids)
            np.testing.assert_allclose(sorted(one.logprobs), sorted(other.logprobs), atol=2e-3)
    if expected.embedding is not None:
        vectors = [np.frombuffer(o.embedding, np.float32) for o in (end, expected)]
        np.testing.assert_allclose(*vectors, atol=1e-4)


def disturb(core: EngineCore, rng: random.Random, lora: LoRARequest) -> list[Future[Any]]:
    """One of what operators do to adapters."""
    match rng.randrange(5):
        case 0:
            core.unload_adapter(lora)
        case 1:
            return [core.refresh_adapter(lora)]
        case 2:
            return [core.preload_adapter(lora, "host")]
        case _:
            return [core.preload_adapter(lora) for _ in range(2)]
    return []


def run_mixed(
    core: EngineCore,
    requests: list[EngineRequest],
    to_abort: set[str],
    loras: list[LoRARequest],
    rng: random.Random,
) -> dict[str, list[EngineOutput]]:
    """Outputs by request."""
    outputs: dict[str, list[EngineOutput]] = {}
    waiting, operations = list(requests), []
    while waiting or core.has_unfinished_requests():
        while waiting and rng.random() < 0.4:
            core.add_request(waiting.pop())
        if rng.random() < 0.1:
            core.abort_requests([rng.choice(sorted(to_abort))])
        if rng.random() < 0.06:
            operations += disturb(core, rng, rng.choice(loras))
        run(core, outputs)
        core.check_integrity()
    assert all(operation.done() for operation in operations)
    return outputs


@pytest.fixture(scope="module")
def requests(loras) -> list[EngineRequest]:
    return make_requests(random.Random(1), loras, 50)


@pytest.fixture(scope="module")
def alone(model, requests) -> dict[str, list[EngineOutput]]:
    core = make_core(model, enable_prefix_caching=False)
    outputs: dict[str, list[EngineOutput]] = {}
    for request in requests:
        core.add_request(request)
        while core.has_unfinished_requests():
            run(core, outputs)
    core.shutdown()
    return outputs


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 4, "max_num_batched_tokens": 30, "max_num_seqs": 30},
        {"block_size": 8, "enable_prefix_caching": False, "eviction_policy": "lru"},
        {"block_size": 16, "host_adapter_bytes": 60_000},
    ],
)
def test_requests_get_what_they_get_alone(model, loras, requests, alone, options):
    rng = random.Random(2)
    page_bytes = PAGE_BYTES_OF_A_TOKEN * options["block_size"]
    # The longest request and an adapter or two.
    num_pages = 1 + MAX_MODEL_LEN // options["block_size"] + 60_000 // page_bytes
    core = make_core(model, pool_bytes=num_pages * page_bytes, **options)
    to_abort = {request.request_id for request in rng.sample(requests, 5)}
    in_any_order = rng.sample(requests, len(requests))
    mixed = run_mixed(core, in_any_order, to_abort, loras, rng)
    stats = core.stats()
    core.shutdown()
    assert stats["page_bytes"] == page_bytes
    assert stats["adapter_loads"] >= len(loras)
    for request_id in alone.keys() - to_abort:
        assert_same(alone[request_id], mixed[request_id])
