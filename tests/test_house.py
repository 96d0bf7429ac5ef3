"""The dependency law of the house, and the size of its rooms, read off the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {
    "engine": {"engine", "attention", "lora", "native"},
    "attention": {"attention", "native"},
    "lora": {"lora", "native"},
    "entrypoints": {"entrypoints", "engine", "attention", "lora"},
    "benchmarks": {"benchmarks", "entrypoints", "engine", "attention", "lora", "native"},
    "csrc": {"native"},
}
HOST_HALF = [
    *(path.relative_to(ROOT / "engine").with_suffix("").as_posix()
      for package in ("", "memory", "scheduling", "adapters")
      for path in sorted((ROOT / "engine" / package).glob("*.py"))),
    "runner/sampling_state",
    "runner/input_batch",
]  # fmt: skip
SOURCES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def imports(path: Path, at_top_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body if at_top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_import_only_what_they_may(path: Path):
    room = path.relative_to(ROOT).parts[0]
    rooms = {
        "native" if name == "loraplex.native" else name.split(".")[1]
        for name in imports(path)
        if name.startswith("loraplex.")
    }
    assert rooms & (ROOMS.keys() | {"native"}) <= ROOMS[room]
    if path.is_relative_to(ROOT / "engine/models"):
        of_lora = {n for n in imports(path) if n.startswith("loraplex.lora")}
        assert all(n.startswith("loraplex.lora.spec") for n in of_lora), "models know no LoRA"
        assert not {n for n in imports(path) if n.startswith("loraplex.attention")}


def is_module(name: str) -> bool:
    return (ROOT / "engine" / f"{name}.py").is_file()


@pytest.mark.parametrize("name", HOST_HALF)
def test_the_host_half_imports_no_torch(name: str):
    seen, waiting = set(), [name]
    while waiting:
        path = ROOT / "engine" / f"{waiting.pop()}.py"
        seen.add(path)
        found = imports(path, at_top_only=True)
        assert not {n for n in found if n.split(".")[0] in ("torch", "transformers")}, path
        modules = [n.removeprefix("loraplex.engine.").split(".") for n in found]
        inner = {"/".join(m[:n]) for m in modules for n in (1, 2)}
        waiting += [n for n in inner if ROOT / "engine" / f"{n}.py" not in seen and is_module(n)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_readable(path: Path):
    text = path.read_text()
    assert len(text.splitlines()) <= 450, "a file that grows past this is two ideas"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 80, f"{node.name} is too long to read"
