"""Many adapters out of few files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file

from loraplex.benchmarks.synthetic_adapters import llama_spec, main, write_adapters
from loraplex.benchmarks.synthetic_model import write_model

WEIGHTS = "adapter_model.safetensors"


def inodes(paths: list[Path]) -> set[int]:
    return {os.stat(path / WEIGHTS).st_ino for path in paths}


def rank_of(path: Path) -> int:
    ranks = {min(tensor.shape) for tensor in load_file(path / WEIGHTS).values()}
    (rank,) = ranks
    assert json.loads((path / "adapter_config.json").read_text())["r"] == rank
    return rank


def test_a_thousand_adapters_are_four_files(tmp_path):
    paths = write_adapters(tmp_path, llama_spec(), 1000, ranks=[4], modules=["q_proj"])
    assert [path.name for path in paths] == [f"a{i}" for i in range(1000)]
    assert len(inodes(paths)) == len(inodes(paths[:4])) == 4
    assert all("q_proj" in name for name in load_file(paths[999] / WEIGHTS))
    tensors = [load_file(path / WEIGHTS) for path in paths[:2]]
    assert any((tensors[0][name] != tensors[1][name]).any() for name in tensors[0])


def test_ranks_go_round(tmp_path):
    paths = write_adapters(tmp_path, llama_spec(), 9, num_files=2, ranks=[4, 8])
    assert [rank_of(path) for path in paths] == [4, 8, 4, 8, 4, 8, 4, 8, 4]
    assert len(inodes(paths)) == 4


def test_symbolic_links_where_there_are_no_hard_ones(tmp_path, monkeypatch):
    def refuse(self: Path, target: Path) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    paths = write_adapters(tmp_path, llama_spec(), 3, num_files=1, ranks=[4])
    # Elsewhere they are still links to each other.
    moved = tmp_path.rename(tmp_path.with_name("moved")) / paths[2].name
    assert (moved / WEIGHTS).is_symlink()
    assert rank_of(moved) == 4


def test_writing_again_replaces(tmp_path):
    write_adapters(tmp_path, llama_spec(), 6, num_files=2, ranks=[4])
    assert {rank_of(p) for p in write_adapters(tmp_path, llama_spec(), 6, 2, ranks=[8])} == {8}


def test_a_module_that_the_model_has_not(tmp_path):
    with pytest.raises(ValueError, match=r"modules=\['qproj'\] are not allowed"):
        write_adapters(tmp_path, llama_spec(), 1, modules=["qproj"])


def test_the_script(tmp_path, capsys):
    model = write_model(tmp_path / "model", "tiny")
    out = tmp_path / "adapters"
    arguments = [str(out), "--model", str(model), "--num-adapters", "6", "--rank", "2", "4"]
    assert main([*arguments, "--num-files", "1"]) == 0
    assert "6 adapters" in capsys.readouterr().out
    paths = sorted(out.iterdir())
    assert len(inodes(paths)) == 2
    assert [rank_of(path) for path in paths] == [2, 4] * 3
