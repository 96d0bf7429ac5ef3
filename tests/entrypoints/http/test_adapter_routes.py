"""Adapters are loaded, swapped, pinned, refreshed and unloaded over HTTP."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import httpx
import pytest
from server_process import ServerProcess, running_server

RUNNING = "loraplex_num_requests_running"


@pytest.fixture(scope="module")
def server(adapter_root) -> Iterator[ServerProcess]:
    with running_server("--allow-runtime-lora", str(adapter_root), "hub:acme") as server:
        yield server


def post(server: ServerProcess, action: str, **body) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/{action}_lora_adapter", json=body, timeout=20)


def complete(server: ServerProcess, model: str, **body) -> httpx.Response:
    body = {"model": model, "prompt": "x", **body}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=20)


def states(server: ServerProcess) -> dict[str, dict]:
    entries = httpx.get(f"{server.url}/v1/lora_adapters").json()["data"]
    return {entry["lora_name"]: entry for entry in entries}


def test_a_name_is_moved_to_another_adapter_in_place(server, adapter_root):
    sql, poet = str(adapter_root / "sql"), str(adapter_root / "poet")
    assert post(server, "load", lora_name="a", lora_path=sql).status_code == 200
    assert "already been loaded" in post(server, "load", lora_name="a", lora_path=poet).text
    assert post(server, "preload", lora_name="a").status_code == 200
    body = {"lora_name": "a", "lora_path": poet, "load_inplace": True, "pin": True}
    assert post(server, "load", **body).status_code == 200
    assert complete(server, "a").status_code == 200
    assert states(server)["a"]["lora_path"] == poet
    assert states(server)["a"]["pinned"] == "pool"
    broken = {**body, "lora_path": str(adapter_root / "broken")}
    assert post(server, "load", **broken).status_code == 404
    assert states(server)["a"]["lora_path"] == poet, "what can't be loaded replaces nothing"
    assert post(server, "load", **{**body, "pin": False}).status_code == 200, "a refresh"
    assert post(server, "unload", lora_name="a").status_code == 200
    assert "a" not in states(server)


def test_pins_and_refreshes_are_of_registered_names(server, adapter_root):
    assert post(server, "load", lora_name="b", lora_path=str(adapter_root / "sql")).is_success
    assert post(server, "unpin", lora_name="b").status_code == 404
    state = post(server, "preload", lora_name="b", tier="host", pin=True).json()
    assert (state["tier"], state["pinned"]) == ("host", "host")
    assert post(server, "unpin", lora_name="b").json()["pinned"] is None
    assert post(server, "refresh", lora_name="b").status_code == 200
    assert post(server, "preload", lora_name="b", tier="disk").status_code == 400
    for action in ("preload", "unpin", "refresh", "unload"):
        assert post(server, action, lora_name="nobody").status_code == 404
    assert post(server, "unload", lora_name="b", delete_files=True).is_success


def test_adapters_may_be_preloaded_and_pinned_at_the_start(adapter_root):
    flags = ["--lora-modules", *(f"{name}={adapter_root}/{name}" for name in ("sql", "poet"))]
    flags += ["--preload-lora-modules", "sql", "--pin-lora-modules", "poet"]
    with running_server(*flags) as server:
        pins = {name: state["pinned"] for name, state in states(server).items()}
        assert pins == {"sql": None, "poet": "pool"}
        assert post(server, "unpin", lora_name="poet").status_code == 403, "as clients may not"


def test_references_are_taken_from_the_allowed_places(server):
    assert post(server, "load", lora_name="hub", lora_path="acme/x@v1").is_success
    assert states(server)["hub"]["lora_path"] == "hub:acme/x@v1"
    for outside in ("other/x", "s3://bucket/x", "/etc"):
        assert post(server, "load", lora_name="x", lora_path=outside).status_code == 403


def test_unloading_may_end_what_runs(server, adapter_root):
    assert post(server, "load", lora_name="c", lora_path=str(adapter_root / "sql")).is_success
    answers = []
    thread = threading.Thread(
        target=lambda: answers.append(complete(server, "c", prompt="long", max_tokens=900))
    )
    thread.start()
    server.wait_for_metric(RUNNING, 1)
    assert post(server, "unload", lora_name="c", abort=True).is_success
    thread.join()
    assert len(answers) == 1
    server.wait_for_metric(RUNNING, 0)
