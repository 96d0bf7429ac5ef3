"""The hub: what is taken of a repository, who may read it, and what is noticed when."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from huggingface_hub import constants

from loraplex.benchmarks.fake_hub import MINIMAL_ADAPTER, FakeHub
from loraplex.benchmarks.faulty_server import FaultyServer
from loraplex.lora.sources.fetcher import AdapterFetcher, FetchedAdapter
from loraplex.lora.sources.reference import parse_adapter_reference
from loraplex.lora.spec import AdapterError

MakeFetcher = Callable[..., AdapterFetcher]


def fetch(fetcher: AdapterFetcher, text: str, token: str | None = None) -> FetchedAdapter:
    """Asks again even what has just failed."""
    return fetcher.fetch(parse_adapter_reference(text), token, refresh=True).result(20)


def refusal(fetcher: AdapterFetcher, text: str, token: str | None = None) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        fetch(fetcher, text, token)
    assert str(parse_adapter_reference(text)) in str(caught.value)
    assert token is None or token not in str(caught.value)
    return caught.value


def test_what_an_adapter_needs_is_taken(
    hub: FakeHub, server: FaultyServer, make_fetcher: MakeFetcher
):
    files = {
        **MINIMAL_ADAPTER,
        "tokenizer.json": b"{}",
        "chat_template.jinja": b"{{ messages }}",
        "README.md": b"#",
        "optimizer.pt": b"much",
        "adapter_model.bin": b"pickled",
        "checkpoint-1/adapter_config.json": b"{}",
    }
    repo = hub.add("acme/a", files)
    with fetch(make_fetcher(), "acme/a") as fetched:
        names = {n for n in os.listdir(fetched.directory) if not n.startswith(".")}
        assert names == {*MINIMAL_ADAPTER, "tokenizer.json", "chat_template.jinja"}
        for name in names:
            assert (fetched.directory / name).read_bytes() == files[name]
        assert fetched.version == repo.revisions["main"]
        assert fetched.num_bytes == sum(len(files[name]) for name in names)
    assert server.count("README") == server.count(".bin") == 0


def test_the_second_time_only_the_version_is_asked_for(
    hub: FakeHub, server: FaultyServer, make_fetcher: MakeFetcher
):
    hub.add("acme/a")
    first = fetch(make_fetcher(), "acme/a")
    num_files = server.count("resolve")
    again = fetch(make_fetcher(), "acme/a@main")
    assert (again.directory, again.key) == (first.directory, first.key)
    assert server.count("resolve") == num_files
    assert server.count("/api/models/acme/a") == 2


def test_revisions_and_subfolders(hub: FakeHub, make_fetcher: MakeFetcher):
    repo = hub.add("acme/a", {f"de/formal/{name}": b"1" for name in MINIMAL_ADAPTER})
    old = repo.revisions["main"]
    repo.commit({f"de/formal/{name}": b"2" for name in MINIMAL_ADAPTER})
    repo.commit({f"de/formal/{name}": b"3" for name in MINIMAL_ADAPTER}, "refs/pr/1")
    fetcher = make_fetcher()
    for revision, content in (("main", b"2"), (old, b"1"), ("refs/pr/1", b"3")):
        with fetch(fetcher, f"acme/a@{revision}/de/formal") as fetched:
            assert (fetched.directory / "adapter_config.json").read_bytes() == content
    error = refusal(fetcher, "acme/a")
    assert "subfolders that have one: de/formal" in str(error) and error.status == 400
    assert "no adapter_config.json" in str(refusal(fetcher, "acme/a/de/form"))
    error = refusal(fetcher, "acme/a@v9/de")
    assert "no revision 'v9'" in str(error) and error.status == 404


def test_a_new_commit_is_noticed(hub: FakeHub, make_fetcher: MakeFetcher):
    repo, fetcher = hub.add("acme/a"), make_fetcher()
    old = fetch(fetcher, "acme/a")
    new_commit = repo.commit({**MINIMAL_ADAPTER, "adapter_model.safetensors": b"better"})
    new = fetch(fetcher, "acme/a")
    assert new.version == new_commit and new.key != old.key
    assert (new.directory / "adapter_model.safetensors").read_bytes() == b"better"
    assert (old.directory / "adapter_model.safetensors").read_bytes() == b"weights"


def test_pickled_weights_are_not_even_downloaded(
    hub: FakeHub, server: FaultyServer, make_fetcher: MakeFetcher
):
    hub.add("acme/a", {"adapter_config.json": b"{}", "adapter_model.bin": b"pickled"})
    assert "adapter_model.bin is pickled" in str(refusal(make_fetcher(), "acme/a"))
    assert server.count("resolve") == 0


def test_a_private_adapter_is_for_its_readers_though_it_is_cached(
    hub: FakeHub, server: FaultyServer, make_fetcher: MakeFetcher
):
    hub.add("acme/a", readers=frozenset({"hf_alice", "hf_amy"}))
    fetcher = make_fetcher()
    with fetch(fetcher, "acme/a", "hf_alice") as fetched:
        assert (fetched.directory / "adapter_model.safetensors").read_bytes() == b"weights"
    num_files = server.count("resolve")
    for token in (None, "hf_bob"):
        error = refusal(fetcher, "acme/a", token)
        assert error.status == 404 and "no such repository, or it is private" in str(error)
    assert fetch(fetcher, "acme/a", "hf_amy").directory == fetched.directory
    assert server.count("resolve") == num_files
    # What one was given says nothing of what the next one is.
    hub.repos["acme/a"].readers = frozenset({"hf_amy"})
    assert refusal(fetcher, "acme/a", "hf_alice").status == 404


def test_a_gated_adapter_is_for_those_who_were_let_in(hub: FakeHub, make_fetcher: MakeFetcher):
    hub.add("acme/a", gated=True, readers=frozenset({"hf_alice"}))
    fetcher = make_fetcher()
    fetch(fetcher, "acme/a", "hf_alice")
    for token in (None, "hf_bob"):
        error = refusal(fetcher, "acme/a", token)
        assert error.status == 403 and "gated" in str(error)


def test_tenants_adapters_of_one_name_never_meet(hub: FakeHub, make_fetcher: MakeFetcher):
    """Each tenant has `support`, in a repository that only its token may read."""
    fetcher = make_fetcher()
    for tenant in ("acme", "bolt"):
        files = {**MINIMAL_ADAPTER, "adapter_model.safetensors": tenant.encode()}
        hub.add(f"{tenant}/support", files, readers=frozenset({f"hf_{tenant}"}))
    fetched = {t: fetch(fetcher, f"{t}/support", f"hf_{t}") for t in ("acme", "bolt")}
    for tenant, adapter in fetched.items():
        weights = (adapter.directory / "adapter_model.safetensors").read_bytes()
        assert weights == tenant.encode()
    assert fetched["acme"].key != fetched["bolt"].key
    assert refusal(fetcher, "acme/support", "hf_bolt").status == 404


def test_the_servers_token_is_for_requests_without_one(
    hub: FakeHub, server: FaultyServer, make_fetcher: MakeFetcher, monkeypatch: pytest.MonkeyPatch
):
    # What the machine's user is logged in with is not the server's.
    monkeypatch.setenv("HF_TOKEN", "hf_login")
    hub.add("acme/a", readers=frozenset({"hf_server", "hf_login"}))
    assert refusal(make_fetcher(), "acme/a").status == 404
    fetcher = make_fetcher(adapter_hub_token="hf_server")
    fetch(fetcher, "acme/a")
    assert refusal(fetcher, "acme/a", "hf_bob").status == 404
    assert "hf_server" not in repr(fetcher._settings)


def test_the_token_goes_to_the_hub_alone(
    hub: FakeHub, server: FaultyServer, make_fetcher: MakeFetcher
):
    hub.add("acme/a", readers=frozenset({"hf_alice"}))
    fetch(make_fetcher(), "acme/a", "hf_alice")
    assert {r.authorization for r in server.seen("/acme/a/resolve")} == {"Bearer hf_alice"}
    [request] = server.seen("/cdn/")
    assert request.host.startswith("localhost") and request.authorization is None


@pytest.mark.parametrize("token", ["hf_\n", "hf_ä", "hf x", "hf_\0"])
def test_a_broken_token_is_not_shown(hub: FakeHub, make_fetcher: MakeFetcher, token: str):
    hub.add("acme/a")
    assert refusal(make_fetcher(), "acme/a", token).status == 400


def test_damage_is_noticed_and_repaired(
    hub: FakeHub, server: FaultyServer, make_fetcher: MakeFetcher
):
    hub.add("acme/a")
    server.add_fault("/cdn/", replace=lambda body: b"W" + body[1:])
    with fetch(make_fetcher(), "acme/a") as fetched:
        assert (fetched.directory / "adapter_model.safetensors").read_bytes() == b"weights"
    server.add_fault("/cdn/", times=9, replace=lambda body: b"W" + body[1:])
    hub.repos["acme/a"].commit({**MINIMAL_ADAPTER, "adapter_model.safetensors": b"another"})
    error = refusal(make_fetcher(adapter_fetch_attempts=2), "acme/a")
    assert "was damaged on its way" in str(error) and error.status == 502


def test_an_answer_that_is_too_short_is_asked_for_again(
    hub: FakeHub, server: FaultyServer, make_fetcher: MakeFetcher
):
    hub.add("acme/a")
    server.add_fault("adapter_config.json", replace=lambda body: body[:1])
    with fetch(make_fetcher(), "acme/a") as fetched:
        assert (fetched.directory / "adapter_config.json").read_bytes() == b"{}"
    assert server.count("adapter_config.json") == 2


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_offline_the_cached_copy_serves(
    hub: FakeHub, server: FaultyServer, make_fetcher: MakeFetcher, offline: Callable[[], None]
):
    hub.add("acme/a")
    hub.add("acme/b")
    commit = fetch(make_fetcher(), "acme/a").version
    num_requests = len(server.requests)
    offline()
    fetcher = make_fetcher()
    for token in (None, "hf_bob"):
        with fetch(fetcher, "acme/a", token) as fetched:
            assert fetched.version == commit
            assert (fetched.directory / "adapter_model.safetensors").read_bytes() == b"weights"
    for text in ("acme/b", "acme/a@v1"):
        error = refusal(fetcher, text)
        assert "HF_HUB_OFFLINE is set" in str(error) and error.status == 404
    assert len(server.requests) == num_requests


def test_offline_private_copies_are_for_those_who_read_them(
    hub: FakeHub, make_fetcher: MakeFetcher, offline: Callable[[], None]
):
    hub.add("acme/a", readers=frozenset({"hf_alice"}))
    hub.add("acme/b", gated=True, readers=frozenset({"hf_alice"}))
    for name in ("acme/a", "acme/b"):
        fetch(make_fetcher(), name, "hf_alice")
    offline()
    fetcher = make_fetcher()
    for name in ("acme/a", "acme/b"):
        fetch(fetcher, name, "hf_alice")
        assert refusal(fetcher, name, "hf_bob").status == 404
        assert refusal(fetcher, name).status == 404
