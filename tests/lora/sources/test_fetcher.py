"""Fetching: nobody waits for another, and what fails fails for whoever asked for it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from types import SimpleNamespace

import pytest

from loraplex.benchmarks.fake_hub import MINIMAL_ADAPTER, FakeHub
from loraplex.benchmarks.faulty_server import FaultyServer
from loraplex.lora.sources import fetcher as fetcher_module
from loraplex.lora.sources.fetcher import AdapterFetcher, FetchedAdapter, SourceSettings
from loraplex.lora.sources.reference import AdapterReference
from loraplex.lora.spec import AdapterError

MakeFetcher = Callable[..., AdapterFetcher]
LARGE = os.urandom(300_000)


def hub_reference(name: str) -> AdapterReference:
    return AdapterReference("hub", f"acme/{name}", "main")


def add_large(hub: FakeHub, name: str) -> None:
    hub.add(f"acme/{name}", {**MINIMAL_ADAPTER, "adapter_model.safetensors": LARGE})


def get(fetcher: AdapterFetcher, name: str, token: str | None = None) -> FetchedAdapter:
    return fetcher.fetch(hub_reference(name), token).result(20)


def refusal(fetcher: AdapterFetcher, name: str, token: str | None = None) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        get(fetcher, name, token)
    assert f"hub:acme/{name}" in str(caught.value)
    return caught.value


def weights(fetched: FetchedAdapter) -> bytes:
    return (fetched.directory / "adapter_model.safetensors").read_bytes()


def test_slow_downloads_delay_nobody(hub: FakeHub, server: FaultyServer, make_fetcher: MakeFetcher):
    fetcher = make_fetcher()
    names = [f"slow-{i}" for i in range(8)]
    for name in names:
        add_large(hub, name)
    faults = [server.add_fault(f"/cdn/acme/{name}/", hold_at=1000) for name in names]
    slow = [fetcher.fetch(hub_reference(name)) for name in names]
    assert all(fault.seen.wait(20) for fault in faults)
    hub.add("acme/quick")
    assert weights(get(fetcher, "quick")) == b"weights"
    assert refusal(fetcher, "missing").status == 404
    assert not any(future.done() for future in slow)
    for fault in faults:
        fault.gate.set()
    assert all(weights(future.result(20)) == LARGE for future in slow)


def test_a_source_that_hangs_leaves_the_others_their_threads(
    hub: FakeHub, server: FaultyServer, make_fetcher: MakeFetcher, tmp_path: Path
):
    fetcher = make_fetcher(adapter_fetch_threads=1)
    hub.add("acme/a")
    fault = server.add_fault("/api/", hold_at=0)
    slow = fetcher.fetch(hub_reference("a"))
    assert fault.seen.wait(20)
    for name, content in MINIMAL_ADAPTER.items():
        (tmp_path / name).write_bytes(content)
    local = fetcher.fetch(AdapterReference("file", str(tmp_path)))
    assert weights(local.result(20)) == b"weights"
    assert not slow.done()
    fault.gate.set()
    slow.result(20)


def test_one_download_however_many_ask(
    hub: FakeHub, server: FaultyServer, make_fetcher: MakeFetcher
):
    hub.add("acme/a")
    fetcher = make_fetcher()
    fault = server.add_fault("/cdn/", hold_at=1)
    futures = [fetcher.fetch(hub_reference("a")) for _ in range(5)]
    assert fault.seen.wait(20)
    futures += [fetcher.fetch(hub_reference("a")) for _ in range(5)]
    # Others may ask with tokens of their own: the hub is asked for each, the files once.
    futures += [fetcher.fetch(hub_reference("a"), f"hf_{i}") for i in range(2)]
    fault.gate.set()
    fetched = [future.result(20) for future in futures]
    assert len({adapter.directory for adapter in fetched}) == 1
    assert server.count("/cdn/") == 1
    assert server.count("/api/") == 3
    assert fetcher.stats()["downloads"] == 1


def test_everybody_has_a_lease(hub: FakeHub, server: FaultyServer, make_fetcher: MakeFetcher):
    for name in "ab":
        add_large(hub, name)
    fetcher = make_fetcher(adapter_cache_bytes=400_000)
    fault = server.add_fault("/cdn/", hold_at=1)
    first, second = (fetcher.fetch(hub_reference("a")) for _ in range(2))
    assert fault.seen.wait(20)
    fault.gate.set()
    first.result(20).close()
    adapter = second.result(20)
    get(fetcher, "b").close()
    assert weights(adapter) == LARGE
    adapter.close()
    get(fetcher, "b").close()
    assert fetcher.num_bytes_on_disk() > 400_000
    hub.add("acme/c")
    get(fetcher, "c").close()
    assert not adapter.directory.exists()


def test_what_is_cut_goes_on_where_it_was(
    hub: FakeHub, server: FaultyServer, make_fetcher: MakeFetcher
):
    add_large(hub, "a")
    server.add_fault("/cdn/", cut_at=100_000)
    server.add_fault("/cdn/", cut_at=50_000)
    fetcher = make_fetcher()
    assert weights(get(fetcher, "a")) == LARGE
    ranges = [request.range for request in server.seen("/cdn/")]
    assert ranges == [None, "bytes=100000-", "bytes=150000-"]
    assert server.count("adapter_config.json") == 1
    stats = fetcher.stats()
    assert stats["retries"] == 2 and stats["downloaded_bytes"] == len(LARGE) + len(b"{}")


def test_a_restart_goes_on_where_it_was(
    hub: FakeHub, server: FaultyServer, make_fetcher: MakeFetcher
):
    add_large(hub, "a")
    server.add_fault("/cdn/", cut_at=100_000)
    error = refusal(make_fetcher(adapter_fetch_attempts=1), "a")
    assert error.status == 502
    assert weights(get(make_fetcher(), "a")) == LARGE
    assert server.seen("/cdn/")[-1].range == "bytes=100000-"


def test_a_server_that_knows_no_ranges_starts_over(
    hub: FakeHub, server: FaultyServer, make_fetcher: MakeFetcher, monkeypatch: pytest.MonkeyPatch
):
    add_large(hub, "a")
    server.add_fault("/cdn/", cut_at=100_000)
    application = server._application

    def without_ranges(environ, start_response):
        environ.pop("HTTP_RANGE", None)
        return application(environ, start_response)

    monkeypatch.setattr(server, "_application", without_ranges)
    assert weights(get(make_fetcher(), "a")) == LARGE


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_what_may_pass_is_tried_again(
    hub: FakeHub, server: FaultyServer, make_fetcher: MakeFetcher, status: int
):
    hub.add("acme/a")
    server.add_fault("/api/", status=status, times=2)
    fetcher = make_fetcher()
    get(fetcher, "a")
    assert server.count("/api/") == 3
    assert fetcher.stats()["retries"] == 2


def test_attempts_are_counted(hub: FakeHub, server: FaultyServer, make_fetcher: MakeFetcher):
    hub.add("acme/a")
    server.add_fault("/api/", status=503, times=100)
    error = refusal(make_fetcher(adapter_fetch_attempts=3), "a")
    assert "HTTP status 503 (3 attempts)" in str(error) and error.status == 502
    assert server.count("/api/") == 3


def test_the_wait_doubles(
    hub: FakeHub, server: FaultyServer, make_fetcher: MakeFetcher, monkeypatch: pytest.MonkeyPatch
):
    asked: list[tuple[float, float]] = []
    uniform = fetcher_module.random.uniform
    monkeypatch.setattr(
        fetcher_module.random, "uniform", lambda a, b: asked.append((a, b)) or uniform(1, 1)
    )
    hub.add("acme/a")
    server.add_fault("/api/", status=503, times=3)
    start = time.monotonic()
    get(make_fetcher(adapter_backoff_seconds=0.05), "a")
    assert time.monotonic() - start >= 0.05 + 0.1 + 0.2
    assert asked == [(0.5, 1.5)] * 3


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_what_will_not_pass_is_not_tried_again(
    hub: FakeHub, server: FaultyServer, make_fetcher: MakeFetcher, status: int
):
    hub.add("acme/a")
    server.add_fault("/api/", status=status, times=100)
    refusal(make_fetcher(), "a")
    assert server.count("/api/") == 1


def test_a_server_that_is_not_there(make_fetcher: MakeFetcher):
    error = refusal(
        make_fetcher(adapter_hub_endpoint="http://127.0.0.1:1", adapter_fetch_attempts=2), "a"
    )
    assert "could not be reached (ConnectError) (2 attempts)" in str(error)
    assert error.status == 502


@pytest.mark.parametrize("path", ["/api/", "/resolve/", "/cdn/"])
def test_a_server_that_does_not_answer(
    hub: FakeHub, server: FaultyServer, make_fetcher: MakeFetcher, path: str
):
    add_large(hub, "a")
    fetcher = make_fetcher(adapter_stall_seconds=0.2, adapter_fetch_attempts=2)
    server.add_fault(path, hold_at=0, times=2)
    error = refusal(fetcher, "a")
    assert "ReadTimeout) (2 attempts)" in str(error) and error.status == 504


def test_a_stall_is_overcome(hub: FakeHub, server: FaultyServer, make_fetcher: MakeFetcher):
    add_large(hub, "a")
    server.add_fault("/cdn/", hold_at=100_000)
    assert weights(get(make_fetcher(adapter_stall_seconds=0.2), "a")) == LARGE
    assert server.seen("/cdn/")[-1].range == "bytes=100000-"


def test_a_fetch_takes_no_longer_than_it_may(
    hub: FakeHub, server: FaultyServer, make_fetcher: MakeFetcher
):
    add_large(hub, "a")
    server.add_fault("/cdn/", hold_at=100_000, times=9)
    # Without that limit the tenth attempt would succeed.
    error = refusal(make_fetcher(adapter_fetch_seconds=0.5, adapter_fetch_attempts=1000), "a")
    assert error.status == 504


def test_a_trickle_is_not_waited_for(hub: FakeHub, server: FaultyServer, make_fetcher: MakeFetcher):
    add_large(hub, "a")
    server.add_fault("/cdn/", pace=0.05)
    error = refusal(make_fetcher(adapter_fetch_seconds=0.5), "a")
    assert "it took too long" in str(error) and error.status == 504
    # What has come is there next time.
    assert weights(get(make_fetcher(), "a")) == LARGE
    assert server.seen("/cdn/")[-1].range is not None


def test_failures_are_remembered_for_a_while(
    hub: FakeHub, server: FaultyServer, make_fetcher: MakeFetcher, monkeypatch: pytest.MonkeyPatch
):
    fetcher = make_fetcher(adapter_retry_seconds=500)
    first, second = refusal(fetcher, "a"), refusal(fetcher, "a")
    assert str(first) == str(second) and first.status == second.status == 404
    assert first is not second
    assert server.count("/api/") == 1
    hub.add("acme/a")
    refusal(fetcher, "a")
    later = SimpleNamespace(monotonic=lambda: time.monotonic() + 501)
    monkeypatch.setattr(fetcher_module, "time", later)
    get(fetcher, "a")
    assert server.count("/api/") == 2


def test_a_refresh_asks_at_once(hub: FakeHub, server: FaultyServer, make_fetcher: MakeFetcher):
    fetcher = make_fetcher(adapter_retry_seconds=60)
    refusal(fetcher, "a")
    hub.add("acme/a")
    fetcher.fetch(hub_reference("a"), refresh=True).result(20)
    # Nor is the failure remembered after that.
    get(fetcher, "a")


def test_a_refresh_does_not_take_an_older_answer(
    hub: FakeHub, server: FaultyServer, make_fetcher: MakeFetcher
):
    repo, fetcher = hub.add("acme/a"), make_fetcher()
    fault = server.add_fault("/api/", hold_at=0)
    before = fetcher.fetch(hub_reference("a"))
    assert fault.seen.wait(20)
    commit = repo.commit({**MINIMAL_ADAPTER, "tokenizer.json": b"{}"})
    after = fetcher.fetch(hub_reference("a"), refresh=True)
    assert after.result(20).version == commit
    fault.gate.set()
    assert before.result(20).version != commit


def test_a_failure_that_a_refresh_has_overtaken_is_not_remembered(
    hub: FakeHub, server: FaultyServer, make_fetcher: MakeFetcher
):
    fetcher = make_fetcher(adapter_retry_seconds=60)
    fault = server.add_fault("/api/", hold_at=0, replace=lambda _: b"null")
    before = fetcher.fetch(hub_reference("a"))
    assert fault.seen.wait(20)
    hub.add("acme/a")
    fetcher.fetch(hub_reference("a"), refresh=True).result(20)
    fault.gate.set()
    with pytest.raises(AdapterError):
        before.result(20)
    get(fetcher, "a")


def test_failures_are_of_those_who_asked(hub: FakeHub, make_fetcher: MakeFetcher):
    hub.add("acme/a", readers=frozenset({"hf_alice"}))
    fetcher = make_fetcher(adapter_retry_seconds=60)
    assert refusal(fetcher, "a", "hf_bob").status == 404
    get(fetcher, "a", "hf_alice")
    assert refusal(fetcher, "a", "hf_bob").status == 404
    assert refusal(fetcher, "a").status == 404


def test_what_is_too_large_is_not_begun(
    hub: FakeHub, server: FaultyServer, make_fetcher: MakeFetcher
):
    add_large(hub, "a")
    error = refusal(make_fetcher(max_adapter_bytes=300_000), "a")
    assert "300002 bytes" in str(error) and "at most 300000" in str(error)
    assert error.status == 400
    assert server.count("/resolve/") == 0
    get(make_fetcher(max_adapter_bytes=300_002), "a")


def test_what_becomes_too_large_is_not_finished(
    hub: FakeHub, server: FaultyServer, make_fetcher: MakeFetcher, tmp_path: Path
):
    add_large(hub, "a")
    server.add_fault("/cdn/", replace=lambda body: body * 20)
    error = refusal(make_fetcher(), "a")
    assert "larger than the 300000 bytes" in str(error)
    left = [path.stat().st_size for path in (tmp_path / "cache/partial").glob("*/*")]
    assert max(left) < len(LARGE)


def test_the_cache_keeps_its_budget(hub: FakeHub, make_fetcher: MakeFetcher):
    fetcher = make_fetcher(adapter_cache_bytes=700_000)
    for name in "abcd":
        add_large(hub, name)
        get(fetcher, name).close()
    assert fetcher.num_bytes_on_disk() <= 700_000
    get(fetcher, "d").close()
    assert fetcher.stats()["cache_hits"] == 1


def test_a_full_disk_is_said(
    hub: FakeHub, make_fetcher: MakeFetcher, monkeypatch: pytest.MonkeyPatch
):
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    hub.add("acme/a")
    error = refusal(make_fetcher(), "a")
    assert "disk of the adapter cache is full" in str(error) and error.status == 507


def test_a_lease_that_cannot_be_had_is_said(
    hub: FakeHub, make_fetcher: MakeFetcher, monkeypatch: pytest.MonkeyPatch
):
    def fail(descriptor: int) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "dup", fail)
    hub.add("acme/a")
    error = refusal(make_fetcher(), "a")
    assert "cannot be opened: Too many open files" in str(error) and error.status == 503


def test_a_waiter_may_leave(hub: FakeHub, server: FaultyServer, make_fetcher: MakeFetcher):
    hub.add("acme/a")
    fetcher = make_fetcher()
    fault = server.add_fault("/cdn/", hold_at=1)
    leaver, stayer = (fetcher.fetch(hub_reference("a")) for _ in range(2))
    assert fault.seen.wait(20)
    assert leaver.cancel()
    fault.gate.set()
    assert weights(stayer.result(20)) == b"weights"
    with pytest.raises(CancelledError):
        leaver.result()


@pytest.mark.parametrize(
    ("name", "value"),
    [("adapter_fetch_attempts", 0), ("adapter_cache_bytes", -1), ("adapter_stall_seconds", 0.0)],
)
def test_settings_that_make_no_sense(name: str, value: float):
    with pytest.raises(ValueError, match=f"{name}={value} is not allowed: it must be"):
        SourceSettings(**{name: value})


def test_no_torch_and_no_boto3_before_they_are_needed():
    script = (
        "import sys, loraplex.lora.sources.fetcher\n"
        "print([name for name in ('torch', 'boto3') if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", script]) == b"[]\n"


def test_closing_ends_what_is_under_way(
    hub: FakeHub, server: FaultyServer, make_fetcher: MakeFetcher
):
    add_large(hub, "a")
    fetcher = make_fetcher(
        adapter_fetch_threads=1, adapter_stall_seconds=0.2, adapter_fetch_attempts=1
    )
    fault = server.add_fault("/cdn/", hold_at=1000)
    running, queued = fetcher.fetch(hub_reference("a")), fetcher.fetch(hub_reference("b"))
    assert fault.seen.wait(20)
    while fetcher.stats()["downloaded_bytes"] < 1000:
        time.sleep(0.001)
    fetcher.close()
    for future in (running, queued, fetcher.fetch(hub_reference("a"))):
        with pytest.raises(AdapterError, match="shutting down") as caught:
            future.result(20)
        assert caught.value.status == 503
