"""Adapters from a hub, an S3 store and directories, through an engine: real protocols and files."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from adapter_stores import AdapterMaker, generate, hub_server, s3_server, tiny_llm
from fake_hub import FakeHub
from faulty_server import FaultyServer

from loraplex import LLM, LoRARequest
from loraplex.benchmarks.synthetic_model import write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), "tiny")


@pytest.fixture
def make(model: Path, tmp_path: Path) -> AdapterMaker:
    return AdapterMaker(model, tmp_path / "adapters")


@pytest.fixture
def hub() -> FakeHub:
    return FakeHub()


@pytest.fixture
def server(hub: FakeHub) -> Iterator[FaultyServer]:
    with hub_server(hub) as server:
        yield server


@pytest.fixture
def llm(model: Path, server: FaultyServer, tmp_path: Path) -> Iterator[LLM]:
    with tiny_llm(model, tmp_path / "cache", adapter_hub_endpoint=server.url) as llm:
        yield llm
        llm.check_integrity()
        server.clear_faults()


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def test_one_adapter_from_everywhere_is_one_adapter(
    model, make, hub, server, tmp_path, credentials
):
    files = make.files(1)
    hub.add("acme/a", files)
    hub.repos["acme/a"].commit({f"deep/{name}": files[name] for name in files}, "v2")
    with s3_server({"team/a": files}) as s3:
        options = {"adapter_hub_endpoint": server.url, "adapter_s3_endpoint_url": s3.url}
        with tiny_llm(model, tmp_path / "cache", **options) as llm:
            paths = [str(make.directory(1)), "acme/a", "hub:acme/a@v2/deep", "s3://adapters/team/a"]
            base, *outputs = generate(llm, [None, *(LoRARequest("a", path) for path in paths)])
            assert all(output == outputs[0] != base for output in outputs)
            llm.check_integrity()


def test_500_first_requests_are_one_download_and_one_load(llm, make, hub, server):
    hub.add("acme/a", make.files(1))
    outputs = generate(llm, [LoRARequest(f"name-{i}", "acme/a") for i in range(500)])
    assert all(output == outputs[0] for output in outputs)
    assert isinstance(outputs[0], list)
    assert server.count("/resolve/") == 2, "the config and the weights, once each"
    assert server.count("/api/models/") == 1
    assert llm.stats()["adapter_loads"] == 1


def test_tenants_adapters_of_one_name_never_meet(llm, make, hub, server):
    for seed, tenant in enumerate(["x", "y"]):
        hub.add(f"{tenant}/private", make.files(seed), readers=frozenset({f"hf_{tenant}"}))
    loras = [
        LoRARequest("private", f"{owner}/private", token=f"hf_{token}" if token else None)
        for owner in "xy"
        for token in ("x", "y", "")
    ]
    for _ in range(2):
        xx, xy, x_, yx, yy, y_ = generate(llm, loras)
        assert isinstance(xx, list)
        assert isinstance(yy, list)
        assert xx != yy
        for error in (xy, x_, yx, y_):
            assert error.status == 404
            assert "hf_" not in str(error)
    assert "hf_" not in repr(loras)


def test_a_hub_that_is_down_fails_who_needs_it_and_no_others(llm, make, hub, server):
    hub.add("acme/a", make.files(1))
    hub.add("acme/b", make.files(2))
    (cached,) = generate(llm, [LoRARequest("a", "acme/a")])
    for _ in range(20):
        server.add_fault("/", status=503, times=10**6)
    again, base, error = generate(
        llm, [LoRARequest("a", "acme/a"), None, LoRARequest("b", "acme/b")]
    )
    assert again == cached
    assert isinstance(base, list)
    assert error.status == 502
    server.clear_faults()
    assert isinstance(generate(llm, [LoRARequest("b", "acme/b")])[0], list)


def test_a_directory_that_is_repaired_serves(llm, make):
    path = make.directory(1)
    (expected,) = generate(llm, [LoRARequest("a", str(make.directory(1, "copy")))])
    weights = path / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:1000])
    bad, base = generate(llm, [LoRARequest("a", str(path)), None])
    assert "truncated" in str(bad)
    assert isinstance(base, list)
    weights.write_bytes(content)
    assert generate(llm, [LoRARequest("a", str(path))]) == [expected]
    shutil.rmtree(path)
    assert generate(llm, [LoRARequest("a", str(path))]) == [expected], "it is in memory"
