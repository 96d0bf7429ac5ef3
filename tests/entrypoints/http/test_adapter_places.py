"""What clients may name: everything below the places, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from loraplex.engine.errors import RequestError
from loraplex.entrypoints.http.adapter_places import AdapterPlaces


@pytest.mark.parametrize(
    ("place", "text", "is_below"),
    [
        ("hub", "hub:acme/a", True),
        ("hub", "acme/a@v1/sub", True),
        ("hub", "s3://bucket/a", False),
        ("hub:acme", "acme/a", True),
        ("hub:acme", "acmeister/a", False),
        ("hub:acme/a", "acme/a@v2", True),
        ("hub:acme/a", "acme/ab", False),
        ("s3://bucket", "s3://bucket/a", True),
        ("s3://bucket/team/", "s3://bucket/team/a", True),
        ("s3://bucket/team", "s3://bucket/team-b/a", False),
        ("s3://bucket", "bucket/a", False),
    ],
)
def test_remote_places(place: str, text: str, is_below: bool):
    places = AdapterPlaces([place])
    if is_below:
        places.parse(text)
        return
    with pytest.raises(RequestError, match="lora_path=") as caught:
        places.parse(text)
    assert caught.value.status == 403
    assert place in str(caught.value)


def test_symlinks_are_followed_before_a_path_is_judged(tmp_path: Path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "in/link").symlink_to(tmp_path / "out")
    places = AdapterPlaces([str(tmp_path / "in"), "hub"])
    assert places.parse(f"{tmp_path}/in/a").location == f"{tmp_path}/in/a"
    for outside in ("in/link/a", "in/../out/a", "out", "in-two"):
        with pytest.raises(RequestError):
            places.parse(f"file:{tmp_path}/{outside}")


def test_adapter_source_and_field_are_the_clients():
    places = AdapterPlaces(["hub"])
    assert places.parse("acme/a", "hub").source == "hub"
    with pytest.raises(RequestError, match="adapter_id='bucket/a' is not allowed"):
        places.parse("bucket/a", "s3", param="adapter_id")


def test_no_place_allows_nothing_and_a_bad_one_is_named():
    assert not AdapterPlaces([])
    with pytest.raises(RequestError):
        AdapterPlaces([]).parse("acme/a")
    with pytest.raises(ValueError, match="allow_runtime_lora='gopher:x' is not allowed"):
        AdapterPlaces(["gopher:x"])
