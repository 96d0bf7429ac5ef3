"""How adapters are called, and that equal things are called equal."""

from __future__ import annotations

import os
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex.lora.sources.reference import (
    AdapterReference,
    parse_adapter_reference,
)
from loraplex.lora.spec import AdapterError


def hub(location: str, revision: str = "main", subfolder: str = "") -> AdapterReference:
    return AdapterReference("hub", location, revision, subfolder)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("acme/support", hub("acme/support")),
        ("hub:acme/support", hub("acme/support")),
        ("hub://acme/support", hub("acme/support")),
        ("HUB:acme/support", hub("acme/support")),
        ("hub:acme/support@main", hub("acme/support")),
        ("acme/support@v1.0", hub("acme/support", "v1.0")),
        ("acme/support/de/formal/", hub("acme/support", subfolder="de/formal")),
        ("acme/support@v1/de//formal", hub("acme/support", "v1", "de/formal")),
        ("acme/support@refs/pr/7/de", hub("acme/support", "refs/pr/7", "de")),
        ("acme/support@refs%2Fpr%2F7/de", hub("acme/support", "refs/pr/7", "de")),
        ("acme/support@topic%2Fnew%25", hub("acme/support", "topic/new%")),
        ("hub:gpt2", hub("gpt2")),
        ("gpt2@v1/de", hub("gpt2", "v1", "de")),
        ("file:/data/a", AdapterReference("file", "/data/a")),
        ("file:///data/a/", AdapterReference("file", "/data/a")),
        ("//data/a", AdapterReference("file", "/data/a")),
        ("/data/../data/./a", AdapterReference("file", "/data/a")),
        ("/data/a@b:c", AdapterReference("file", "/data/a@b:c")),
        ("s3://bucket/team/a/", AdapterReference("s3", "bucket/team/a")),
        ("s3:bucket/team/a", AdapterReference("s3", "bucket/team/a")),
    ],
)
def test_forms(text: str, expected: AdapterReference):
    assert parse_adapter_reference(text) == expected
    assert parse_adapter_reference(str(expected)) == expected


def test_a_directory_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert parse_adapter_reference("acme/support").source == "hub"
    (tmp_path / "acme/support").mkdir(parents=True)
    path = str(tmp_path / "acme/support")
    for text in ("acme/support", "./acme/support", "file:acme/support", "acme/../acme/support"):
        assert parse_adapter_reference(text) == AdapterReference("file", path)
    assert parse_adapter_reference("hub:acme/support").source == "hub"
    assert parse_adapter_reference("./missing").location == str(tmp_path / "missing")
    assert parse_adapter_reference("~/a").location == os.path.expanduser("~/a")


@pytest.mark.parametrize(
    ("text", "adapter_source", "expected"),
    [
        ("acme/support", "hub", hub("acme/support")),
        ("acme/support", "HUB", hub("acme/support")),
        ("/data/a", "local", AdapterReference("file", "/data/a")),
        ("file:/data/a", "local", AdapterReference("file", "/data/a")),
        ("bucket/a", "s3", AdapterReference("s3", "bucket/a")),
        ("s3://bucket/a", "s3", AdapterReference("s3", "bucket/a")),
    ],
)
def test_adapter_sources_of_lorax(text: str, adapter_source: str, expected: AdapterReference):
    assert parse_adapter_reference(text, adapter_source) == expected


def test_adapter_source_local_takes_names_that_look_like_a_hubs():
    reference = parse_adapter_reference("acme/support", "local")
    assert reference == AdapterReference("file", os.path.abspath("acme/support"))


@pytest.mark.parametrize(
    ("text", "adapter_source", "message"),
    [
        ("acme/support", "pbase", "paid service"),
        ("acme/support", "ftp", "adapter_source='ftp' is not allowed.*'hub', 'local', 's3'"),
        ("s3://bucket/a", "hub", r"'s3://bucket/a' is not allowed with adapter_source='hub'"),
        ("/data/a", "hub", "'/data/a' is not a hub id"),
        ("https://example.com/a", None, "its scheme must be one of hub, file, s3"),
        ("", None, "1 to 1024 printable characters"),
        ("a" * 2000, None, "1 to 1024 printable characters"),
        ("acme/sup\0port", None, "printable"),
        ("acme/support\n", None, "printable"),
        ("acme/../support", None, "'acme/../support' is not a hub id"),
        ("acme/support@", None, "is not a hub id"),
        ("acme/support@..", None, "no branch, tag or commit"),
        ("acme/support@a b", None, "no branch, tag or commit"),
        ("acme/support/../x", None, "'.' or '..'"),
        ("acme/support/de@v1", None, r"hub:owner/name\[@revision\]\[/subfolder\]"),
        ("-acme/support", None, "is not a hub id"),
        ("hub:", None, "is not a hub id"),
        (
            "suport",
            None,
            "'suport' is not allowed: there is no such directory, and a hub",
        ),
        ("s3://bucket", None, "s3://bucket/prefix"),
        ("s3:///a", None, "s3://bucket/prefix"),
        ("file:", None, "allowed are"),
        ("file://host/a", None, "takes no host"),
    ],
)
def test_what_is_refused(text: str, adapter_source: str | None, message: str):
    with pytest.raises(AdapterError, match=message) as caught:
        parse_adapter_reference(text, adapter_source)
    assert caught.value.status == 400


NAMES = st.text(string.ascii_letters + string.digits + "_", min_size=1, max_size=8)
REVISIONS = st.text(string.ascii_letters + "/%-_2F5", min_size=1, max_size=12)


@given(NAMES, NAMES, REVISIONS, st.lists(NAMES, max_size=3))
def test_the_canonical_text_means_the_same(
    owner: str, name: str, revision: str, folders: list[str]
):
    reference = hub(f"{owner}/{name}", revision, "/".join(folders))
    assert parse_adapter_reference(str(reference)) == reference


@given(st.text(max_size=40))
def test_any_text_is_a_reference_or_refused_in_words(text: str):
    try:
        reference = parse_adapter_reference(text)
    except AdapterError as error:
        assert repr(text) in str(error)
    else:
        assert parse_adapter_reference(str(reference)) == reference
