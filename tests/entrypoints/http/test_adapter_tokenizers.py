"""Chat templates of adapters that come from a hub: they are there before the prompt is made, and
nobody else waits for them."""

from __future__ import annotations

import asyncio
import time

import httpx
import openai
import pytest
from server_process import running_server

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    hub = tmp_path_factory.mktemp("hub")
    for name in ("quick", "slow"):
        (hub / name).mkdir()
        (hub / name / "chat_template.jinja").write_text(f"{name}: ")
    (hub / "slow.held").touch()
    return hub


@pytest.fixture(scope="module")
def server(hub):
    modules = [f"{name}=hub:acme/{name}" for name in ("quick", "slow", "missing")]
    with running_server("--lora-modules", *modules, FAKE_HUB=str(hub)) as server:
        yield server


async def test_who_waits_for_a_template(server, hub):
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:

        async def ask(model: str) -> str:
            answer = await client.chat.completions.create(model=model, messages=MESSAGES)
            return answer.choices[0].message.content

        before = server.metric("loraplex_adapter_fetches_total")
        slow = [asyncio.create_task(ask("slow")) for _ in range(8)]
        while server.metric("loraplex_adapter_fetches_total") == before:
            await asyncio.sleep(0.01)
        one_waits = time.monotonic()
        assert await ask("fake") == "user: hiassistant: "
        assert await ask("quick") == "quick: user: hiassistant: "
        assert not any(task.done() for task in slow)
        slow.pop().cancel()
        await asyncio.sleep(0.5)
        waited = time.monotonic() - one_waits
        (hub / "slow.held").unlink()
        assert set(await asyncio.gather(*slow)) == {"slow: user: hiassistant: "}
        assert await ask("slow") == "slow: user: hiassistant: "
        assert server.metric("loraplex_adapter_fetches_total") == before + 2, "each once"

        # That is part of the time to the first token.
        assert server.metric("loraplex_time_to_first_token_seconds_sum") > waited


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"messages": MESSAGES}),
        ("/v1/completions", {"prompt": "x"}),
    ],
)
def test_every_route_finds_it(server, path, body):
    answer = httpx.post(f"{server.url}{path}", json={"model": "quick", **body})
    assert answer.status_code == 200
