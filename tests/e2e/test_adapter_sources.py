"""Adapters from a hub, an S3 store and directories, through an engine: real protocols and files."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from adapter_stores import PARAMS, PROMPT, generate, tiny_llm
from tiny_tokenizer import write_tokenizer

from loraplex import LLM, LoRARequest
from loraplex.benchmarks.faulty_server import FaultyServer
from loraplex.benchmarks.s3_server import s3_server

pytestmark = pytest.mark.usefixtures("one_thread")


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


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


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


def test_chat_templates_come_with_adapters(
    model, make, hub, server, tmp_path, credentials, monkeypatch
):
    """From the hub and from S3, before a prompt is made of the messages."""
    with_tokenizer = shutil.copytree(model, tmp_path / "model")
    write_tokenizer(with_tokenizer, 255)

    def files(mark: str) -> dict[str, bytes]:
        template = f"{{{{ messages[0].content }}}}{mark}"
        return {**make.files(1), "chat_template.jinja": template.encode()}

    repository = hub.add("acme/a", files("!"))
    with s3_server({"team/a": files("?")}) as s3:
        options = {"adapter_hub_endpoint": server.url, "adapter_s3_endpoint_url": s3.url}
        cache = tmp_path / "cache"
        with tiny_llm(with_tokenizer, cache, skip_tokenizer_init=False, **options) as llm:
            of_hub, of_s3 = (LoRARequest("a", path) for path in ("acme/a", "s3://adapters/team/a"))

            def prompts(*loras: LoRARequest) -> list[str | None]:
                chats = [[{"role": "user", "content": "hi"}]] * len(loras)
                outputs = llm.chat(chats, PARAMS, list(loras), use_tqdm=False)
                return [output.prompt for output in outputs]

            assert prompts(of_hub, of_s3, of_hub) == ["hi!", "hi?", "hi!"]
            repository.commit(files("."))
            assert prompts(of_hub) == ["hi!"], "until it is refreshed"
            assert llm.refresh_adapter(of_hub)["changed"]
            assert prompts(of_hub, of_s3) == ["hi.", "hi?"]
            # An hour later, without the hub and without files: all that is needed is in memory.
            server.add_fault("/", status=503, times=10**6)
            shutil.rmtree(cache)
            monkeypatch.setattr(llm._tokenizers, "_clock", lambda: time.monotonic() + 3600)
            assert not llm._tokenizers.is_placed(of_hub)
            assert prompts(of_hub) == ["hi."]
            server.clear_faults()
            with pytest.raises(ValueError, match="acme/nothing"):
                llm.generate("hi", PARAMS, LoRARequest("b", "acme/nothing"), use_tqdm=False)
            assert llm.stats()["adapters"]["b"]["failures"] >= 1
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
    identities = [adapter.identities for adapter in llm._core._adapters]
    assert len(identities) == 2
    assert "hf_" not in repr((loras, identities))


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


def test_a_new_commit_is_served_when_it_is_asked_for(llm, make, hub, server, tmp_path):
    repo = hub.add("acme/a", make.files(1))
    lora = LoRARequest("a", "acme/a")
    (first,) = generate(llm, [lora])
    repo.commit(make.files(2))
    assert generate(llm, [lora]) == [first]
    assert llm.refresh_adapter(lora)["changed"]
    (second,) = generate(llm, [lora])
    assert second != first
    assert not llm.refresh_adapter(lora)["changed"]
    repo.commit({**make.files(3), "adapter_model.safetensors": b"no weights"})
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors"):
        llm.refresh_adapter(lora)
    assert generate(llm, [lora]) == [second]
    assert [state["references"] for state in llm.adapters()] == [["hub:acme/a"]]


def test_unloading_frees_every_tier(llm, make, hub, server, tmp_path):
    hub.add("acme/a", make.files(1))
    lora = LoRARequest("a", "acme/a")
    state = llm.preload_adapter(lora, pin=True)
    assert state["num_pages"] == llm.stats()["pages_adapter"] > 0
    generate(llm, [lora])
    assert list((tmp_path / "cache/entries").iterdir())
    llm.unload_adapter(lora, delete_files=True)
    stats = llm.stats()
    assert stats["pages_free"] == stats["pages_total"]
    assert llm.adapters() == []
    assert stats["host_adapter_bytes"] == 0
    wait_until(lambda: not list((tmp_path / "cache/entries").iterdir()))


def test_a_pin_in_host_memory_stays_within_its_budget(model, make, tmp_path):
    loras = [LoRARequest(str(i), str(make.directory(i, str(i)))) for i in range(4)]
    with tiny_llm(model, tmp_path / "cache") as llm:
        llm.preload_adapter(loras[0], tier="host")
        num_bytes = llm.stats()["host_adapter_bytes"]
    with tiny_llm(model, tmp_path / "cache", host_adapter_bytes=int(1.5 * num_bytes)) as llm:
        assert llm.preload_adapter(loras[0], tier="host", pin=True)["pinned"] == "host"
        with pytest.raises(ValueError, match="no room to pin the adapter in host memory"):
            llm.preload_adapter(loras[1], tier="host", pin=True)
        outputs = generate(llm, loras)
        assert all(isinstance(output, list) for output in outputs)
        assert llm.stats()["host_adapter_bytes"] <= 2 * num_bytes
        llm.check_integrity()


def test_what_happened_is_counted_and_timed(llm, make, hub, server):
    hub.add("acme/a", make.files(1))
    loras = [LoRARequest("a", "acme/a"), LoRARequest("gone", "acme/gone"), None]
    for is_first in (True, False):
        outputs = llm.generate(
            [PROMPT] * 3, PARAMS, lora_request=loras, use_tqdm=False, return_errors=True
        )
        times = outputs[0].metrics
        parts = [times.queue_seconds, times.download_seconds, times.host_load_seconds,
                 times.copy_seconds, times.prefill_seconds]  # fmt: skip
        assert sum(parts) == pytest.approx(times.first_token_time - times.arrival_time)
        assert min(parts) >= 0
        assert (times.download_seconds > 0) is (times.host_load_seconds > 0) is is_first
        assert outputs[2].metrics.download_seconds == 0
    assert llm.stats()["adapters"] == {
        "a": counts(hits=1, misses=1, loads=1, downloads=1),
        "gone": counts(failures=2),
    }
    (state,) = llm.adapters()
    assert state["tier"] == "pool"


def counts(**counts: int) -> dict[str, int]:
    names = ("hits", "misses", "loads", "evictions", "downloads", "failures")
    return dict.fromkeys(names, 0) | counts
