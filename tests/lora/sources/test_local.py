"""Local directories: below the roots, and nowhere else."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loraplex.lora.sources.fetcher import AdapterFetcher, FetchedAdapter
from loraplex.lora.sources.reference import AdapterReference, parse_adapter_reference
from loraplex.lora.spec import AdapterError


def write_adapter(directory: Path, **files: bytes) -> Path:
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_bytes(b"{}")
    (directory / "adapter_model.safetensors").write_bytes(b"weights")
    return directory


def fetch(fetcher: AdapterFetcher, path: Path | str, refresh: bool = True) -> FetchedAdapter:
    return fetcher.fetch(AdapterReference("file", str(path)), refresh=refresh).result(20)


def refusal(fetcher: AdapterFetcher, path: Path | str) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        fetch(fetcher, path)
    assert repr(f"file:{path}") in str(caught.value)
    return caught.value


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def fetcher(make_fetcher: Callable[..., AdapterFetcher], root: Path) -> AdapterFetcher:
    return make_fetcher(adapter_roots=(str(root),), adapter_retry_seconds=0.0)


def test_a_directory_is_read_where_it_is(fetcher: AdapterFetcher, root: Path):
    directory = write_adapter(root / "team/a")
    with fetch(fetcher, directory) as fetched:
        assert fetched.directory == directory
        assert fetched.num_bytes == len(b"{}weights")
        assert fetcher.stats()["downloads"] == 0


def test_a_change_is_another_version(fetcher: AdapterFetcher, root: Path):
    directory = write_adapter(root / "a")
    before, again = fetch(fetcher, directory), fetch(fetcher, directory)
    assert (again.version, again.key) == (before.version, before.key)
    (directory / "adapter_model.safetensors").write_bytes(b"others!")
    after = fetch(fetcher, directory)
    assert after.version != before.version and after.key != before.key


def test_a_symlink_may_be_repointed(fetcher: AdapterFetcher, root: Path):
    first, second = write_adapter(root / "v1"), write_adapter(root / "v2")
    link = root / "latest"
    link.symlink_to("v1")
    before = fetch(fetcher, link)
    assert before.directory == first
    assert before.key == fetch(fetcher, first).key
    link.unlink()
    link.symlink_to("v2")
    assert fetch(fetcher, link).directory == second


def test_the_roots_confine(fetcher: AdapterFetcher, root: Path, tmp_path: Path):
    outside = write_adapter(tmp_path / "outside")
    write_adapter(tmp_path / "root-2")
    (root / "link").symlink_to(outside)
    (root / "up").symlink_to("..")
    sneaky = write_adapter(root / "sneaky")
    (sneaky / "adapter_model.safetensors").unlink()
    (sneaky / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    for path in (
        outside,
        tmp_path / "missing",
        tmp_path / "root-2",
        f"{root}/../outside",
        root / "link",
        root / "up/outside",
        sneaky,
    ):
        error = refusal(fetcher, path)
        assert error.status == 403 and "not below a directory" in str(error)


def test_symlinks_below_the_roots_are_fine(fetcher: AdapterFetcher, root: Path):
    directory = write_adapter(root / "snapshot")
    (root / "blobs").mkdir()
    weights = directory / "adapter_model.safetensors"
    weights.rename(root / "blobs/weights")
    weights.symlink_to("../blobs/weights")
    assert fetch(fetcher, directory).num_bytes == len(b"{}weights")


def test_without_roots_any_path_will_do(
    make_fetcher: Callable[..., AdapterFetcher], tmp_path: Path
):
    directory = write_adapter(tmp_path / "anywhere")
    reference = parse_adapter_reference(str(directory))
    assert make_fetcher().fetch(reference).result(20).directory == directory


def test_what_is_no_adapter_is_refused(fetcher: AdapterFetcher, root: Path):
    assert refusal(fetcher, root / "missing").status == 404
    assert refusal(fetcher, root / ("x" * 300)).status == 404
    empty = root / "empty"
    empty.mkdir()
    assert "no adapter_config.json" in str(refusal(fetcher, empty))
    (empty / "adapter_config.json").write_bytes(b"{}")
    assert "no adapter_model.safetensors" in str(refusal(fetcher, empty))
    # A pipe would never end.
    os.mkfifo(empty / "adapter_model.safetensors")
    assert "no adapter_model.safetensors" in str(refusal(fetcher, empty))


def test_pickled_weights_are_refused_unless_allowed(
    make_fetcher: Callable[..., AdapterFetcher], root: Path
):
    directory = write_adapter(root / "a")
    (directory / "adapter_model.safetensors").unlink()
    shared = torch.arange(4.0)
    torch.save({"x": shared, "y": shared[:2]}, directory / "adapter_model.bin")

    error = refusal(make_fetcher(), directory)
    assert "adapter_model.bin is pickled" in str(error) and error.status == 400

    fetcher = make_fetcher(allow_pickled_adapters=True, adapter_retry_seconds=0.0)
    with fetch(fetcher, directory) as fetched:
        assert sorted(os.listdir(fetched.directory)) == [
            ".lock", ".manifest.json", "adapter_config.json", "adapter_model.safetensors",
        ]  # fmt: skip
        tensors = load_file(fetched.directory / "adapter_model.safetensors")
        assert tensors["x"].tolist() == [0, 1, 2, 3] and tensors["y"].tolist() == [0, 1]
        version = fetched.version
    torch.save({"x": torch.zeros(2)}, directory / "adapter_model.bin")
    assert fetch(fetcher, directory).version != version


class Malice:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


@pytest.mark.parametrize("content", [[torch.zeros(2)], {"x": 1}, {"x": Malice()}])
def test_pickles_are_unpacked_with_care(
    make_fetcher: Callable[..., AdapterFetcher],
    root: Path,
    content: object,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(root)
    directory = write_adapter(root / "a")
    (directory / "adapter_model.safetensors").unlink()
    torch.save(content, directory / "adapter_model.bin")
    error = refusal(make_fetcher(allow_pickled_adapters=True), directory)
    assert "adapter_model.bin is not a" in str(error) and error.status == 400
    assert not (root / "hacked").exists()
