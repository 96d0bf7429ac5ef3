"""What goes wrong with adapters fails for whoever asked for them, and leaves nothing behind."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from adapter_stores import PROMPT, generate, tiny_llm

from loraplex import LLM, LoRARequest, SamplingParams
from loraplex.benchmarks.faulty_server import FaultyServer
from loraplex.benchmarks.s3_server import s3_server
from loraplex.engine.core import EngineCore
from loraplex.engine.messages import EngineRequest
from loraplex.lora import host_store

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def llm(model: Path, server: FaultyServer, tmp_path: Path) -> Iterator[LLM]:
    """At the end nothing of the adapters is left in it, once they are unloaded."""
    with tiny_llm(model, tmp_path / "cache", adapter_hub_endpoint=server.url) as llm:
        yield llm
        server.clear_faults()
        assert_nothing_leaks(llm)


def assert_nothing_leaks(llm: LLM) -> None:
    llm.check_integrity()
    for state in llm.adapters():
        for path in state["references"]:
            llm.unload_adapter(LoRARequest("any", path))
    stats = llm.stats()
    assert stats["pages_adapter"] == stats["pages_adapter_idle"] == stats["host_adapter_bytes"] == 0
    assert llm.adapters() == []
    llm.check_integrity()
    leases = [p for p in map(open_file, os.listdir("/proc/self/fd")) if p.endswith("/.lock")]
    assert leases == []


def open_file(descriptor: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except FileNotFoundError:
        return ""


def served_beside(llm: LLM, bad: LoRARequest, good: list[LoRARequest | None]) -> Exception:
    """The error of the bad request; the others must not notice it."""
    expected = generate(llm, good)
    error, *others = generate(llm, [bad, *good])
    assert others == expected
    assert all(isinstance(output, list) for output in expected)
    assert isinstance(error, ValueError)
    return error


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda content: content[: len(content) // 2], "truncated"),
        (lambda content: b"\xff" * 8 + content[8:], "adapter_model.safetensors cannot be read"),
        (lambda content: b"", "adapter_model.safetensors cannot be read"),
        (lambda content: content.replace(b"lora_A", b"lora_Z"), "has no partner"),
    ],
    ids=["truncated", "header", "empty", "names"],
)
def test_a_corrupt_file(llm, make, hub, damage: Callable[[bytes], bytes], words: str):
    hub.add("acme/good", make.files(1))
    repo = hub.add("acme/bad", make.files(2))
    files = make.files(2)
    weights = files["adapter_model.safetensors"]
    repo.commit({**files, "adapter_model.safetensors": damage(weights)})
    bad, good = LoRARequest("bad", "acme/bad"), LoRARequest("good", "acme/good")
    assert words in str(served_beside(llm, bad, [good, None]))
    repo.commit(files)
    assert isinstance(generate(llm, [bad])[0], list), "a repaired one is served at once"


def test_a_full_disk(llm, make, hub, monkeypatch):
    hub.add("acme/good", make.files(1))
    hub.add("acme/bad", make.files(2))
    bad, good = LoRARequest("bad", "acme/bad"), LoRARequest("good", "acme/good")
    generate(llm, [good])
    with monkeypatch.context() as patch:

        def fail(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(os, "fsync", fail)
        error = served_beside(llm, bad, [good, None])
        assert error.status == 507
        assert "disk of the adapter cache is full" in str(error)
    assert isinstance(generate(llm, [bad])[0], list)


def test_a_store_that_times_out(model, make, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with s3_server({"good": make.files(1), "slow": make.files(2)}) as s3:
        options = {"adapter_s3_endpoint_url": s3.url, "adapter_stall_seconds": 0.3}
        with tiny_llm(model, tmp_path / "cache", **options) as llm:
            good = LoRARequest("good", "s3://adapters/good")
            slow = LoRARequest("slow", "s3://adapters/slow")
            generate(llm, [good])
            s3.add_fault("slow/adapter_model", hold_at=0, times=9)
            error = served_beside(llm, slow, [good, None])
            assert error.status == 504
            assert "secret" not in str(error)
            s3.clear_faults()
            assert isinstance(generate(llm, [slow])[0], list)
            assert_nothing_leaks(llm)


def test_an_adapter_that_is_deleted_while_it_is_read(llm, make, monkeypatch):
    path, good = make.directory(1, "doomed"), LoRARequest("good", str(make.directory(2)))
    load_adapter = host_store.load_adapter

    def delete_and_load(recipe, *args):
        if str(path) in recipe:
            shutil.rmtree(path, ignore_errors=True)
        return load_adapter(recipe, *args)

    monkeypatch.setattr(host_store, "load_adapter", delete_and_load)
    doomed = LoRARequest("doomed", str(path))
    assert str(path) in str(served_beside(llm, doomed, [good, None]))
    assert served_beside(llm, doomed, [good, None]).status == 404


def test_downloads_that_are_deleted_are_fetched_again(llm, make, hub, server, tmp_path):
    hub.add("acme/a", make.files(1))
    lora = LoRARequest("a", "acme/a")
    (expected,) = generate(llm, [lora])
    shutil.rmtree(tmp_path / "cache/entries")
    assert generate(llm, [lora]) == [expected], "it is in memory"
    llm.unload_adapter(lora)
    assert generate(llm, [lora]) == [expected]
    assert llm.stats()["adapter_downloads"] == 2


def test_a_hub_that_is_slow_for_one_adapter_holds_up_no_other(llm, make, hub, server):
    hub.add("acme/slow", make.files(1))
    hub.add("acme/good", make.files(2))
    fault = server.add_fault("/cdn/acme/slow/", hold_at=1000)
    core = llm._core
    requests = {name: make_request(name, f"acme/{name}") for name in ("slow", "good")}
    for request in requests.values():
        core.add_request(request)
    assert finish(core, {"good"}) == {"good"}
    assert core.stats()["num_fetching"] == 1
    fault.gate.set()
    assert finish(core, {"slow"}) == {"slow"}


def make_request(request_id: str, path: str, max_tokens: int = 6) -> EngineRequest:
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=PROMPT,
        sampling_params=SamplingParams(temperature=0, ignore_eos=True),
        max_tokens=max_tokens,
        eos_token_ids=[],
        seed=0,
        lora_request=LoRARequest(request_id, path),
    )


def finish(core: EngineCore, request_ids: set[str]) -> set[str]:
    """Step until these are finished; those that are."""
    finished: set[str] = set()
    while not request_ids <= finished:
        outputs = core.step()
        assert all(output.error is None for output in outputs)
        finished |= {output.request_id for output in outputs if output.finish_reason}
        if not outputs:
            core.wait_for_work(0.1)
    return finished


@pytest.mark.slow
def test_200_adapters_are_swapped_under_load(model, make, tmp_path):
    """Links are turned to other directories, while requests for all of them run."""
    num_adapters, num_seeds = 200, 4
    weights = [make.directory(seed) for seed in range(num_seeds)]
    links = [tmp_path / f"link-{i}" for i in range(num_adapters)]
    options = {"host_adapter_bytes": 2 << 20, "pool_bytes": 2 << 20, "max_num_seqs": 16}
    with tiny_llm(model, tmp_path / "cache", **options) as llm:
        expected = generate(llm, [LoRARequest(str(path), str(path)) for path in weights])
        assert len({tuple(tokens) for tokens in expected}) == num_seeds
        core, refreshes, tokens, seeds = llm._core, [], {}, {}
        for version in range(3):
            for i, link in enumerate(links):
                seed = (i + version) % num_seeds
                turn(link, copy_of(weights[seed], tmp_path / f"{i}-{version}"))
                if version:
                    refresh = core.refresh_adapter(LoRARequest(str(i), str(link)))
                    refreshes.append(refresh)
                request = make_request(f"{version}-{i}", str(link))
                seeds[request.request_id] = {seed, (seed - 1) % num_seeds} if version else {seed}
                core.add_request(request)
                collect(core, tokens)
            while core.has_unfinished_requests():
                collect(core, tokens)
            core.check_integrity()
        for request_id, allowed in seeds.items():
            assert tokens[request_id] in [expected[seed] for seed in allowed]
        assert all(refresh.result()["changed"] for refresh in refreshes)
        final = generate(llm, [LoRARequest(str(link), str(link)) for link in links])
        assert final == [expected[(i + 2) % num_seeds] for i in range(num_adapters)]
        assert core.stats()["adapter_evictions"] > 0
        assert_nothing_leaks(llm)


def copy_of(adapter: Path, directory: Path) -> Path:
    """As far as an engine can tell."""
    directory.mkdir()
    for file in adapter.iterdir():
        (directory / file.name).hardlink_to(file)
    return directory


def turn(link: Path, target: Path) -> None:
    temporary = link.with_suffix(".new")
    temporary.symlink_to(target)
    temporary.rename(link)


def collect(core: EngineCore, tokens: dict[str, list[int]]) -> None:
    outputs = core.step()
    for output in outputs:
        assert output.error is None, output.error
        tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
    if not outputs:
        core.wait_for_work(0.1)
