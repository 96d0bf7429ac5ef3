"""S3-compatible stores, by way of a real server in a thread."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

from loraplex.benchmarks.faulty_server import FaultyServer
from loraplex.lora.sources.fetcher import AdapterFetcher, FetchedAdapter
from loraplex.lora.sources.reference import parse_adapter_reference
from loraplex.lora.spec import AdapterError

MakeFetcher = Callable[..., AdapterFetcher]
WEIGHTS = os.urandom(300_000)
FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": WEIGHTS}


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def store() -> Iterator[FaultyServer]:
    with FaultyServer(DomainDispatcherApplication(create_backend_app)) as store:
        yield store


@pytest.fixture
def bucket(store: FaultyServer) -> Iterator[Any]:
    """The bucket `adapters`, empty."""
    s3 = boto3.resource("s3", endpoint_url=store.url, region_name="us-east-1")
    bucket = s3.create_bucket(Bucket="adapters")
    yield bucket
    store.clear_faults()
    bucket.objects.delete()
    bucket.delete()


@pytest.fixture
def make_s3_fetcher(make_fetcher: MakeFetcher, store: FaultyServer) -> MakeFetcher:
    return lambda **options: make_fetcher(adapter_s3_endpoint_url=store.url, **options)


def put(bucket: Any, prefix: str, files: dict[str, bytes] = FILES) -> None:
    for name, content in files.items():
        bucket.put_object(Key=f"{prefix}/{name}", Body=content)


def fetch(fetcher: AdapterFetcher, text: str = "s3://adapters/team/a") -> FetchedAdapter:
    return fetcher.fetch(parse_adapter_reference(text), refresh=True).result(20)


def refusal(fetcher: AdapterFetcher, text: str = "s3://adapters/team/a") -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        fetch(fetcher, text)
    assert text in str(caught.value) and "secret" not in str(caught.value)
    return caught.value


def test_what_an_adapter_needs_is_taken(bucket: Any, make_s3_fetcher: MakeFetcher):
    put(bucket, "team/a", FILES | {"README.md": b"#", "old/adapter_config.json": b"[]"})
    put(bucket, "team/a-2", {"tokenizer.json": b"another's"})
    with fetch(make_s3_fetcher()) as fetched:
        names = {name for name in os.listdir(fetched.directory) if not name.startswith(".")}
        assert names == set(FILES)
        assert all((fetched.directory / name).read_bytes() == FILES[name] for name in names)


def test_a_changed_object_is_another_version(
    bucket: Any, store: FaultyServer, make_s3_fetcher: MakeFetcher
):
    put(bucket, "team/a")
    fetcher = make_s3_fetcher()
    old, again = fetch(fetcher), fetch(make_s3_fetcher(), "s3:adapters/team/a")
    assert (again.version, again.directory) == (old.version, old.directory)
    assert store.count("adapter_model") == 1
    put(bucket, "team/a", {"adapter_config.json": b"{ }"})
    new = fetch(fetcher)
    assert new.version != old.version and new.key != old.key
    assert (new.directory / "adapter_config.json").read_bytes() == b"{ }"
    assert (old.directory / "adapter_config.json").read_bytes() == b"{}"


def test_what_is_cut_goes_on_where_it_was(
    bucket: Any, store: FaultyServer, make_s3_fetcher: MakeFetcher
):
    put(bucket, "team/a")
    store.add_fault("adapter_model", cut_at=200_000)
    with fetch(make_s3_fetcher()) as fetched:
        assert (fetched.directory / "adapter_model.safetensors").read_bytes() == WEIGHTS
    first, second = (request.range for request in store.seen("adapter_model"))
    start = int(second.removeprefix("bytes=").removesuffix("-"))
    assert first is None and 0 < start <= 200_000


def test_a_change_during_the_download_mixes_nothing(
    bucket: Any, store: FaultyServer, make_s3_fetcher: MakeFetcher
):
    put(bucket, "team/a")
    fault = store.add_fault("adapter_model", cut_at=200_000)
    fetcher = make_s3_fetcher(adapter_backoff_seconds=0.2)
    future = fetcher.fetch(parse_adapter_reference("s3://adapters/team/a"))
    assert fault.seen.wait(20)
    put(bucket, "team/a", {"adapter_model.safetensors": WEIGHTS[::-1]})
    with future.result(20) as fetched:
        assert (fetched.directory / "adapter_model.safetensors").read_bytes() == WEIGHTS[::-1]


def test_a_change_between_listing_and_download_is_noticed(
    bucket: Any, store: FaultyServer, make_s3_fetcher: MakeFetcher
):
    put(bucket, "team/a")
    fault = store.add_fault("adapter_config", hold_at=0)
    future = make_s3_fetcher().fetch(parse_adapter_reference("s3://adapters/team/a"))
    assert fault.seen.wait(20)
    put(bucket, "team/a", {"adapter_model.safetensors": WEIGHTS[::-1]})
    fault.gate.set()
    with future.result(20) as fetched:
        assert (fetched.directory / "adapter_model.safetensors").read_bytes() == WEIGHTS[::-1]
        assert fetched.version == fetch(make_s3_fetcher()).version


def test_what_may_pass_is_tried_again(
    bucket: Any, store: FaultyServer, make_s3_fetcher: MakeFetcher
):
    put(bucket, "team/a")
    store.add_fault("/adapters", status=503, times=2)
    fetcher = make_s3_fetcher()
    fetch(fetcher)
    assert fetcher.stats()["retries"] == 2
    store.add_fault("/adapters", status=500, times=100)
    num_requests = len(store.requests)
    error = refusal(make_s3_fetcher(adapter_fetch_attempts=3))
    assert "(500) (3 attempts)" in str(error) and error.status == 502
    assert len(store.requests) == num_requests + 3


def test_a_store_that_does_not_answer(
    bucket: Any, store: FaultyServer, make_s3_fetcher: MakeFetcher
):
    put(bucket, "team/a")
    store.add_fault("adapter_model", hold_at=0, times=9)
    error = refusal(make_s3_fetcher(adapter_stall_seconds=0.2, adapter_fetch_attempts=2))
    assert "(ReadTimeoutError) (2 attempts)" in str(error) and error.status == 504


def test_a_store_that_is_not_there(make_fetcher: MakeFetcher):
    error = refusal(
        make_fetcher(adapter_s3_endpoint_url="http://127.0.0.1:1", adapter_fetch_attempts=1)
    )
    assert "could not be reached (EndpointConnectionError)" in str(error)
    assert error.status == 502


@pytest.mark.parametrize("status", [401, 403])
def test_what_the_server_may_not_read(
    bucket: Any, store: FaultyServer, make_s3_fetcher: MakeFetcher, status: int
):
    store.add_fault("/adapters", status=status)
    error = refusal(make_s3_fetcher())
    assert "does not let this server read it" in str(error) and error.status == 403
    assert store.count("/adapters") == 1


def test_what_is_not_there(bucket: Any, make_s3_fetcher: MakeFetcher):
    put(bucket, "team/a")
    fetcher = make_s3_fetcher()
    for text in ("s3://adapters/team", "s3://adapters/team/b", "s3://missing/team/a"):
        assert refusal(fetcher, text).status == 404
    put(bucket, "team/pickled", {"adapter_config.json": b"{}", "adapter_model.bin": b""})
    assert "adapter_model.bin is pickled" in str(refusal(fetcher, "s3://adapters/team/pickled"))


def test_the_roots_confine(bucket: Any, store: FaultyServer, make_s3_fetcher: MakeFetcher):
    put(bucket, "team/a")
    put(bucket, "team-2/a")
    num_requests = len(store.requests)
    fetcher = make_s3_fetcher(adapter_s3_roots=("adapters/team", "s3://other/"))
    for text in ("s3://adapters/team-2/a", "s3://adapters/a", "s3://others/team"):
        error = refusal(fetcher, text)
        assert "not below a prefix" in str(error) and error.status == 403
    assert len(store.requests) == num_requests
    fetch(fetcher)


def test_public_buckets_need_no_credentials(
    bucket: Any,
    store: FaultyServer,
    make_s3_fetcher: MakeFetcher,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Any,
):
    put(bucket, "team/a")
    bucket.Acl().put(ACL="public-read")
    for item in bucket.objects.all():
        item.Acl().put(ACL="public-read")
    store.requests.clear()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    fetch(make_s3_fetcher())
    assert store.requests and all(request.authorization is None for request in store.requests)


def test_without_boto3_it_says_what_to_install(
    make_s3_fetcher: MakeFetcher, monkeypatch: pytest.MonkeyPatch
):
    for name in [name for name in sys.modules if name.startswith("botocore")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "botocore", None)
    error = refusal(make_s3_fetcher())
    assert "pip install 'loraplex[s3]'" in str(error) and error.status == 501
