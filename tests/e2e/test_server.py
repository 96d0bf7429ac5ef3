"""The real server with the real model, through the official client."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator

import httpx
import lorax
import pytest
from openai import AsyncOpenAI
from real_server import serving

from loraplex import LLM, EngineConfig, LoRARequest, SamplingParams
from loraplex.benchmarks.synthetic_adapters import write_adapter
from loraplex.engine.models.registry import lora_spec

MODEL = EngineConfig().model
NUM_STREAMS, NUM_ADAPTERS, MAX_TOKENS = 64, 16, 24


@pytest.fixture(scope="module")
def adapter_paths(tmp_path_factory) -> dict[str, str]:
    spec, _ = lora_spec(MODEL)
    directory = tmp_path_factory.mktemp("served")
    return {
        f"a{i}": str(write_adapter(directory / f"a{i}", spec, rank=4 + 4 * (i % 4), seed=i))
        for i in range(NUM_ADAPTERS)
    }


@pytest.fixture(scope="module")
def server(adapter_paths) -> Iterator[str]:
    """URL of a server with the adapters."""
    with serving(adapter_paths) as url:
        yield url


def metric(url: str, name: str) -> float:
    text = httpx.get(f"{url}/metrics").text
    return float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)[1])


def make_prompts(long_text_ids: list[int]) -> list[list[int]]:
    return [long_text_ids[i * 20 : i * 20 + 12 + i % 30] for i in range(NUM_STREAMS)]


async def stream(client: AsyncOpenAI, model: str, prompt: list[int], cancel_after: int | None):
    """The text of one streamed completion; cancelled midway, what came until then."""
    pieces = await client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=MAX_TOKENS,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True, "skip_special_tokens": False},
    )
    text, num_pieces = "", 0
    async for piece in pieces:
        text += piece.choices[0].text
        num_pieces += 1
        if num_pieces == cancel_after:
            await pieces.close()
            break
    return text


async def run_streams(url: str, prompts: list[list[int]]) -> list[str]:
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=300) as client:
        return await asyncio.gather(
            *(
                stream(client, f"a{i % NUM_ADAPTERS}", prompt, 3 if i % 10 == 9 else None)
                for i, prompt in enumerate(prompts)
            )
        )


def test_concurrent_streams_equal_offline_and_cancelled_ones_leave_nothing(
    server, adapter_paths, long_text_ids
):
    prompts = make_prompts(long_text_ids)
    params = SamplingParams(
        temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, skip_special_tokens=False
    )
    with LLM(MODEL, dtype="float32", max_model_len=512) as llm:
        offline = llm.generate(
            prompts,
            params,
            lora_request=[
                LoRARequest(name := f"a{i % NUM_ADAPTERS}", adapter_paths[name])
                for i in range(NUM_STREAMS)
            ],
            use_tqdm=False,
        )
    texts = asyncio.run(run_streams(server, prompts))
    for i, (text, output) in enumerate(zip(texts, offline, strict=True)):
        expected = output.outputs[0].text
        if i % 10 == 9:
            assert expected.startswith(text)
            assert len(text) < len(expected)
        else:
            assert text == expected, i

    deadline = time.monotonic() + 10
    while metric(server, "loraplex_num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.05)
    for name in ("num_requests_running", "num_requests_waiting"):
        assert metric(server, f"loraplex_{name}") == 0
    for state in ("kv", "adapter"):
        assert metric(server, f'loraplex_pages{{state="{state}"}}') == 0
    aborted = metric(server, 'loraplex_request_success_total{finished_reason="abort"}')
    assert aborted == NUM_STREAMS // 10


def test_lorax_answers_what_completions_answer(server):
    prompt = "The quick brown fox"
    client = lorax.Client(server, timeout=300)
    for adapter in ("a0", None):
        body = {"model": adapter or MODEL, "prompt": prompt, "max_tokens": 12, "temperature": 0}
        completion = httpx.post(f"{server}/v1/completions", json=body, timeout=300).json()
        whole = client.generate(prompt, adapter_id=adapter, max_new_tokens=12)
        assert whole.generated_text == completion["choices"][0]["text"]
        events = list(client.generate_stream(prompt, adapter_id=adapter, max_new_tokens=12))
        assert events[-1].generated_text == whole.generated_text
        texts = [event.token.text for event in events if not event.token.special]
        assert "".join(texts) == whole.generated_text
        assert [t.id for t in whole.details.tokens] == [event.token.id for event in events]
    embedding = client.embed(prompt).embeddings
    body = {"model": MODEL, "input": prompt}
    other = httpx.post(f"{server}/v1/embeddings", json=body, timeout=300).json()
    assert embedding == pytest.approx(other["data"][0]["embedding"])
    schema = {"enum": ["yes", "no"]}
    response_format = {"type": "json_object", "schema": schema}
    answer = client.generate(prompt, response_format=response_format, max_new_tokens=30)
    assert json.loads(answer.generated_text) in ("yes", "no")


def test_chat_and_models(server):
    async def talk():
        async with AsyncOpenAI(base_url=f"{server}/v1", api_key="none") as client:
            models = await client.models.list()
            reply = await client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "What is the capital of France?"}],
                max_tokens=20,
                temperature=0,
            )
            return models, reply

    models, reply = asyncio.run(talk())
    assert {model.id for model in models.data} == {MODEL, *(f"a{i}" for i in range(NUM_ADAPTERS))}
    assert "Paris" in reply.choices[0].message.content
    assert reply.usage.completion_tokens > 0
