"""Adapters that cannot be served fail their own requests by a clear error, and no others."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import openai
import pytest
from real_server import serving

from loraplex import LLM, EngineConfig, LoRARequest, SamplingParams
from loraplex.benchmarks.synthetic_adapters import adapter_tensors, write_adapter
from loraplex.engine.models.registry import lora_spec
from loraplex.lora.spec import BaseModelSpec

MAX_TOKENS = 12
MISSHAPEN = "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"
# What each error must say.
BROKEN = {
    "truncated": "adapter_model.safetensors cannot be read: it is truncated",
    "misshapen": MISSHAPEN,
    "without-config": "there is no adapter_config.json",
    "vanished": "there is no such directory",
}


def write_adapters(directory: Path, spec: BaseModelSpec) -> dict[str, str]:
    """Three sound adapters, and four that `break_adapters` is to break."""
    names = ["sound-0", "sound-1", "sound-2", *BROKEN]
    paths = {
        name: write_adapter(directory / name, spec, rank=8, modules=["q_proj"], seed=seed)
        for seed, name in enumerate(names)
    }
    return {name: str(path) for name, path in paths.items()}


def break_adapters(paths: dict[str, str], spec: BaseModelSpec) -> None:
    weights = Path(paths["truncated"]) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    tensors = adapter_tensors(spec, rank=8, modules=["q_proj"])
    tensors[MISSHAPEN] = tensors[MISSHAPEN][:, :-1].contiguous()
    write_adapter(paths["misshapen"], spec, rank=8, modules=["q_proj"], tensors=tensors)
    (Path(paths["without-config"]) / "adapter_config.json").unlink()
    shutil.rmtree(paths["vanished"])


@pytest.fixture(scope="module")
def spec() -> BaseModelSpec:
    return lora_spec(EngineConfig().model)[0]


@pytest.fixture
def paths(tmp_path, spec) -> dict[str, str]:
    return write_adapters(tmp_path, spec)


def make_requests(paths: dict[str, str], long_text_ids: list[int]) -> list[tuple]:
    """(prompt, adapter's name) in turns, the broken ones amid the others."""
    names = [None, *paths] * 2
    return [(long_text_ids[i * 10 : i * 10 + 20], name) for i, name in enumerate(names)]


def generate(llm: LLM, requests: list[tuple], paths: dict[str, str]):
    return llm.generate(
        [prompt for prompt, _ in requests],
        SamplingParams(
            temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, skip_special_tokens=False
        ),
        lora_request=[name and LoRARequest(name, paths[name]) for _, name in requests],
        use_tqdm=False,
        return_errors=True,
    )


@pytest.fixture
def expected(paths, long_text_ids) -> dict[int, str]:
    """Texts of the requests that must not be harmed, from an engine that has only those."""
    requests = make_requests(paths, long_text_ids)
    sound = {i: r for i, r in enumerate(requests) if r[1] not in BROKEN}
    with LLM(dtype="float32", max_model_len=512) as llm:
        outputs = generate(llm, list(sound.values()), paths)
    return {i: output.outputs[0].text for i, output in zip(sound, outputs, strict=True)}


def test_offline_each_broken_adapter_fails_its_own_requests(paths, spec, long_text_ids, expected):
    break_adapters(paths, spec)
    requests = make_requests(paths, long_text_ids)
    with LLM(dtype="float32", max_model_len=512) as llm:
        outputs = generate(llm, requests, paths)
        llm.check_integrity()
    for i, ((_, name), output) in enumerate(zip(requests, outputs, strict=True)):
        if name in BROKEN:
            assert BROKEN[name] in str(output.error), name
        else:
            assert output.error is None
            assert output.outputs[0].text == expected[i], name


def test_served_each_broken_adapter_fails_its_own_requests(paths, spec, long_text_ids, expected):
    requests = make_requests(paths, long_text_ids)

    async def ask(client: openai.AsyncOpenAI, prompt: list[int], name: str | None):
        return await client.completions.create(
            model=name or EngineConfig().model,
            prompt=prompt,
            max_tokens=MAX_TOKENS,
            temperature=0,
            extra_body={"ignore_eos": True, "skip_special_tokens": False},
        )

    async def ask_all(url: str):
        async with openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="none", timeout=300, max_retries=0
        ) as client:
            return await asyncio.gather(
                *(ask(client, prompt, name) for prompt, name in requests), return_exceptions=True
            )

    with serving(paths) as url:
        break_adapters(paths, spec)
        replies = asyncio.run(ask_all(url))
    for i, ((_, name), reply) in enumerate(zip(requests, replies, strict=True)):
        if name in BROKEN:
            assert isinstance(reply, openai.APIStatusError), reply
            assert 400 <= reply.status_code < 500
            assert BROKEN[name] in reply.message, name
        else:
            assert reply.choices[0].text == expected[i], name
