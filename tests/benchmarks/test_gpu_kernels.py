"""The benchmark of GPU kernels without a GPU: its cases, by stand-ins that check what they get."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from loraplex import native
from loraplex.benchmarks import gpu_kernels
from loraplex.benchmarks.gpu_kernels import Grid, LoraCase
from loraplex.benchmarks.gpu_timing import GpuBench, Memory
from loraplex.benchmarks.kernel_cases import GROUPS, ModelShape
from loraplex.lora import reference

CPU = torch.device("cpu")
GRID = Grid(
    shape=ModelShape(2, hidden=64, intermediate=128, num_heads=4, num_kv_heads=2, head_dim=16),
    vocab_size=256,
    ranks=(8, 16),
    batches=(4, 1),
    num_adapters=(2, "batch"),
    prefill_rows=40,
    prefill_adapters=(1, 4),
    decode_contexts=(32,),
    prefills=((1, 32), (2, 16)),
    attention_backend="native",
    rotated_bytes=1 << 17,
    min_calls=2,
    max_calls=64,
)
NUM_LORA_CASES = 2 * (2 + 1 + 2)


class SlowBench(GpuBench):
    """Runs every call; each takes a microsecond by its clock."""

    def seconds(self, calls):
        self.calls = list(calls)
        for call in calls:
            call()
        return 1e-6


@pytest.fixture
def bench() -> SlowBench:
    torch.manual_seed(0)
    return SlowBench(Memory(16 << 20, CPU), CPU, repetitions=1, product_size=64)


def segments(items, num_items, pages):
    """What the plan was made of: segment_indptr and page_tables. Items follow one another."""
    assert num_items.tolist() == [len(items)]
    items = items.tolist()
    assert all(1 <= end - begin <= 32 for begin, end, _, _ in items)
    assert [begin for begin, *_ in items[1:]] == [end for _, end, *_ in items[:-1]]
    num_pages = len(pages) // len({first for _, _, first, _ in items})
    indptr = torch.tensor([items[0][0], *(end for _, end, *_ in items)], dtype=torch.int32)
    return indptr, torch.stack([pages[first : first + num_pages] for _, _, first, _ in items])


@pytest.fixture
def slow_kernels(monkeypatch) -> None:
    """The LoRA kernels by their reference twins, with the arguments of the CUDA ones."""

    def shrink(v, x, _partials, counters, pool, items, num_items, pages, layer, modules,
               num_modules):  # fmt: skip
        assert not counters.any()
        indptr, tables = segments(items, num_items, pages)
        assert indptr[-1] == len(x) == len(v)
        reference.shrink(v, x, pool, indptr, tables, layer, modules, num_modules)

    def expand(y, v, pool, items, num_items, pages, layer, modules, num_modules, offsets):
        indptr, tables = segments(items, num_items, pages)
        reference.expand(y, v, pool, indptr, tables, layer, modules, num_modules, offsets)
        assert offsets[-1] == y.shape[1]

    monkeypatch.setattr(native, "cuda_lora_shrink", shrink, raising=False)
    monkeypatch.setattr(native, "cuda_lora_expand", expand, raising=False)


@pytest.mark.usefixtures("slow_kernels", "one_thread")
def test_all_cases(bench, tmp_path, capsys):
    output = tmp_path / "out.json"
    assert gpu_kernels.run(bench, GRID, "NVIDIA H200", list(gpu_kernels.FAMILIES), output) == 0
    result = json.loads(output.read_text())["figures"]
    assert result["failures"] == {}
    assert result["nominal_terabytes_per_second"] == 4.8
    assert result["copy_terabytes_per_second"] > 0
    cases = {case["case"]: case for case in result["cases"]}
    of = {name: [c for c in cases if c.startswith(f"{name}:")] for name in
          ("lora layer", "attention", "linears", "rows")}  # fmt: skip
    assert [len(names) for names in of.values()] == [NUM_LORA_CASES, 4, 3 * 5 - 1, 3 * 5 + 2]
    assert len(cases) == 5 * NUM_LORA_CASES + 4 + 14 + 17
    # W of 64 inputs and 128 outputs, 2 adapters' A of 3 modules and B, and 4 rows of x and y.
    qkv = cases["lora qkv: B4 A2 r8"]
    num_bytes = 2 * (64 * 128 + 2 * 8 * (64 * 3 + 128) + 4 * (64 + 128))
    flops = 2 * 4 * (64 * 128 + 8 * (64 * 3 + 128))
    assert qkv["gigabytes_per_second"] == pytest.approx(num_bytes / 1e3)
    assert qkv["gflops"] == pytest.approx(flops / 1e3)
    table = bench.table
    floor = max(num_bytes / table.peak_bytes, flops / table.peak_flops)
    assert qkv["floor_microseconds"] == pytest.approx(floor * 1e6)
    assert qkv["share_of_ceiling"] == pytest.approx(floor / 1e-6)
    assert cases["lora layer: B4 A2 r8"]["microseconds"] == pytest.approx(4)
    decode = cases["attention: decode 4 x 32"]
    assert decode["gigabytes_per_second"] == pytest.approx(
        2 * (4 * 32 * 2 * 2 * 16 + 2 * 4 * (64 + 2 * 2 * 16)) / 1e3
    )
    assert "lora qkv: B4 A2 r8" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("slow_kernels", "one_thread")
def test_no_two_calls_share_what_they_touch(bench):
    case = LoraCase(bench, GRID, rows=4, num_adapters=2, rank=8)
    calls = case.calls(GROUPS["gate_up"])
    assert len(calls) * case.bytes_of(GROUPS["gate_up"]) >= GRID.rotated_bytes
    touched = [tensor for call in calls for tensor in call.args[:2]]
    ends = {tensor.data_ptr(): tensor.data_ptr() + tensor.nbytes for tensor in touched}
    assert len(ends) == 2 * len(calls)
    assert all(end <= begin for end, begin in
               zip(sorted(ends.values())[:-1], sorted(ends)[1:], strict=True))  # fmt: skip
    assert min(ends) >= case.pool.data_ptr() + case.pool.nbytes
    assert len({call.args[2:] for call in calls}) == len(calls), "adapters and layer"


@pytest.mark.usefixtures("slow_kernels")
def test_fewer_layers_where_memory_is_short():
    # Of pages of 4 KiB, 4 adapters take 5 each for a layer and 9 for two, and there are 30.
    bench = SlowBench(Memory(160 << 10, CPU), CPU, repetitions=1, product_size=32)
    case = LoraCase(bench, GRID, rows=4, num_adapters=4, rank=8)
    assert (case.spec.num_layers, case.num_sets) == (1, 1)
    assert len(case.calls(GROUPS["o"])) == 1


def test_number_of_calls():
    grid = Grid()
    assert grid.num_calls(1 << 20) == 256
    assert grid.num_calls(1 << 30) == grid.min_calls
    assert grid.num_calls(1 << 10) == grid.max_calls
    cases = list(grid.lora_cases())
    assert cases[0] == (64, 16, 16)
    assert {case[2] for case in cases} == {8, 16, 64}
    assert {(rows, count) for rows, count, _ in cases} == {
        (1, 1), (16, 1), (16, 16), (64, 1), (64, 16), (64, 64),
        (256, 1), (256, 16), (256, 64), (256, 256), (2048, 1), (2048, 16),
    }  # fmt: skip


@pytest.mark.usefixtures("one_thread")
def test_what_fails_or_is_not_installed_leaves_the_rest(bench, tmp_path, capsys, monkeypatch):
    def fail(bench, grid):
        yield from ()
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(gpu_kernels.FAMILIES, "lora", fail)
    grid = Grid(**{**GRID.__dict__, "attention_backend": "flashinfer"})
    output = tmp_path / "out.json"
    families = ["lora", "attention", "linears"]
    assert gpu_kernels.run(bench, grid, "A card", families, output) == 1
    result = json.loads(output.read_text())["figures"]
    assert result["failures"] == {"lora": "no such kernel"}
    assert {case["case"].split(":")[0] for case in result["cases"]} == {"linears"}
    assert "nominal_teraflops" not in result
    printed = capsys.readouterr().out
    assert "lora failed: no such kernel" in printed
    assert "attention is left out" in printed


def test_memory_ends(bench):
    memory = Memory(1 << 10, CPU)
    memory.take(2, 100)
    assert memory.take(256).data_ptr() % 16 == 0
    with pytest.raises(RuntimeError, match="more memory than 1024 bytes"):
        memory.take(1)


@pytest.mark.parametrize(
    ("flags", "words"),
    [([], "this benchmark is for CUDA devices"), (["--repetitions", "0"], "1 or")],
)
def test_mistakes(monkeypatch, flags, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=words):
        gpu_kernels.main([*flags, "--output", str(Path("never.json"))])
