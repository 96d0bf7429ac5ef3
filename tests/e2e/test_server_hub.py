"""The real server with adapters from a hub, by the clients of both of its protocols."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import lorax
import openai
import pytest
from adapter_stores import PROMPT, AdapterMaker
from lorax import errors
from real_server import serving

from loraplex.benchmarks.fake_hub import FakeHub
from loraplex.benchmarks.faulty_server import FaultyServer

# Prompts and answers are words of the tiny model's tokenizer, one for each token.
TEXT = " ".join(f"w{token_id}" for token_id in PROMPT)
NUM_TOKENS = 6
OWN, FOREIGN = "hf_of-the-owner", "hf_of-another-tenant"


class Served:
    """A hub with adapters, and a server that reads from it."""

    def __init__(self, url: str, hub: FakeHub, hub_server: FaultyServer) -> None:
        self.url, self.hub, self.hub_server = url, hub, hub_server
        self.openai = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        self.lorax = lorax.Client(url, timeout=60)

    def complete(self, model: str, **extra: Any) -> str:
        options = {"max_tokens": NUM_TOKENS, "temperature": 0}
        options["extra_body"] = {"ignore_eos": True, **extra}
        return self.openai.completions.create(model=model, prompt=TEXT, **options).choices[0].text

    def generate(self, adapter_id: str | None = None, **options: Any) -> str:
        options |= {"max_new_tokens": NUM_TOKENS, "ignore_eos_token": True}
        return self.lorax.generate(TEXT, adapter_id=adapter_id, **options).generated_text

    def post(self, route: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/{route}_lora_adapter", json=body, timeout=60)


@pytest.fixture(scope="module")
def maker(model: Path, tmp_path_factory: pytest.TempPathFactory) -> AdapterMaker:
    return AdapterMaker(model, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def served(
    model: Path, maker: AdapterMaker, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    hub = FakeHub()
    cache = tmp_path_factory.mktemp("cache")
    with FaultyServer(hub) as hub_server:
        flags = ("--load-format", "dummy", "--device", "cpu", "--pool-bytes", "8M",
                 "--allow-runtime-lora", "hub", "--adapter-hub-endpoint", hub_server.url,
                 "--adapter-cache-directory", str(cache), "--adapter-backoff-seconds", "0.01",
                 "--adapter-retry-seconds", "0")  # fmt: skip
        # By its path, to be compared with.
        with serving({"local": str(maker.directory(1))}, *flags, "--max-model-len", "128",
                     model=str(model)) as url:  # fmt: skip
            yield Served(url, hub, hub_server)


def test_both_protocols_serve_a_hub_id_from_one_download(served: Served, maker: AdapterMaker):
    served.hub.add("acme/public", maker.files(1))
    assert served.post("load", lora_name="named", lora_path="acme/public@main").is_success
    expected = served.complete("local")
    assert len(expected.split()) == NUM_TOKENS
    assert expected != served.generate()
    assert served.complete("named") == expected
    assert served.generate("acme/public", adapter_source="hub") == expected
    assert served.generate("hub:acme/public", api_token=OWN) == expected
    assert served.hub_server.count("/cdn/acme/public/") == 1
    assert served.hub_server.seen("/api/models/acme/public")[-1].authorization == f"Bearer {OWN}"


def test_a_cached_copy_is_not_for_whoever_may_not_read_it(served: Served, maker: AdapterMaker):
    served.hub.add("acme/private", maker.files(1), readers=frozenset({OWN}))

    def generate(token: str | None) -> str:
        return served.generate("acme/private", adapter_source="hub", api_token=token)

    for _ in range(2):
        assert generate(OWN) == served.complete("local")
        for token in (None, FOREIGN):
            with pytest.raises(errors.GenerationError, match="acme/private") as refused:
                generate(token)
            assert not any(secret in str(refused.value) for secret in (OWN, FOREIGN))
    # A name that OpenAI's clients use brings no token, and neither does their API key.
    assert served.post("load", lora_name="secret", lora_path="acme/private").is_success
    with pytest.raises(openai.NotFoundError, match="acme/private"):
        served.complete("secret")
    assert served.hub_server.count("/cdn/acme/private/") == 1


def test_a_new_revision_is_served_after_a_refresh(served: Served, maker: AdapterMaker):
    repo = served.hub.add("acme/changing", maker.files(2))
    first = repo.revisions["main"]
    assert served.post("load", lora_name="changing", lora_path="acme/changing").is_success
    old = served.complete("changing")
    repo.commit(maker.files(1))
    assert served.complete("changing") == old
    assert served.post("refresh", lora_name="changing").json()["changed"]
    new = served.complete("local")
    assert served.complete("changing") == served.generate("acme/changing") == new != old
    assert not served.post("refresh", lora_name="changing").json()["changed"]
    assert served.generate(f"acme/changing@{first}", adapter_source="hub") == old, "it is there yet"


def test_a_hub_that_fails_is_told_and_asked_again(served: Served, maker: AdapterMaker):
    served.hub.add("acme/late", maker.files(1))
    served.hub_server.add_fault("/api/models/acme/late", status=503, times=10**6)
    with pytest.raises(errors.GenerationError, match="503"):
        served.generate("acme/late", adapter_source="hub")
    served.hub_server.clear_faults()
    assert served.generate("acme/late", adapter_source="hub") == served.complete("local")


def test_openai_clients_name_an_adapter_by_its_source(served: Served, maker: AdapterMaker):
    served.hub.add("acme/by-source", maker.files(1))
    served.hub.add("acme/closed", maker.files(1), readers=frozenset({OWN}))
    expected = served.complete("local")
    for model in ("acme/by-source", "hub:acme/by-source@main"):
        assert served.complete(model) == expected
    assert served.complete("acme/by-source", adapter_source="hub") == expected
    assert served.hub_server.count("/cdn/acme/by-source/") == 1
    assert served.complete("") == served.generate(), "the base model"
    (embedding,) = served.openai.embeddings.create(model="acme/by-source", input=PROMPT).data
    (local,) = served.openai.embeddings.create(model="local", input=PROMPT).data
    assert embedding.embedding == local.embedding
    # The client's API key is no token for the hub.
    requests = served.hub_server.seen("/api/models/acme/by-source")
    assert {request.authorization for request in requests} <= {None, ""}
    assert "acme/by-source" not in {model.id for model in served.openai.models.list()}
    assert served.complete("acme/closed", api_token=OWN) == expected
    for token, status in ((OWN, 200), (FOREIGN, 424)):  # Of this route, errors are LoRAX's.
        body = {"model": "acme/closed", "prompt": "w7", "api_token": token}
        assert httpx.post(f"{served.url}/tokenize", json=body, timeout=60).status_code == status
    for options in ({}, {"api_token": FOREIGN}):
        with pytest.raises(openai.NotFoundError, match="acme/closed"):
            served.complete("acme/closed", **options)


@pytest.mark.parametrize(
    ("source", "words"), [("nobody", "a hub id has an owner"), ("/etc", "from below hub only")]
)
def test_what_is_no_source_is_404(served: Served, source: str, words: str):
    with pytest.raises(openai.NotFoundError, match=words) as caught:
        served.complete(source)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        served.openai.models.retrieve("acme/by-source")
