"""The CUDA LoRA kernels against dense algebra in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loraplex import native
from loraplex.lora.image import AdapterWeights, pack_image
from loraplex.lora.layers import shrink_scratch
from loraplex.lora.plan import MAX_RANK, plan_items
from loraplex.lora.spec import BaseModelSpec, LoRAModule

IN_FEATURES = 1096  # not a multiple of a tile's 64 columns
WIDTHS = [520, 72, 128]
OFFSETS = [0, 520, 592, 720]
PAGE_BYTES = 1 << 18
LAYER, NUM_LAYERS = 1, 2
# Of the norm of the result. The floor is what rounding the exact result to bfloat16 costs.
ERROR_PER_FLOOR = {torch.bfloat16: 1.05, torch.float32: 16.0}
SPEC = BaseModelSpec(
    "LlamaForCausalLM",
    NUM_LAYERS,
    tuple(LoRAModule(f"m{i}", f"mlp.m{i}", IN_FEATURES, width) for i, width in enumerate(WIDTHS)),
)


class Case:
    """Segments of rows, each with an adapter of its own, in shuffled pages of a poisoned pool."""

    def __init__(self, segments: list[tuple[int, int]], num_base_rows: int, dtype: torch.dtype):
        """segments: (rows, rank); the second module of every third adapter is not targeted."""
        torch.manual_seed(0)
        self.dtype = dtype
        images, self.weights = [], []
        for index, (_, rank) in enumerate(segments):
            targeted = [0, 2] if index % 3 == 2 else [0, 1, 2]
            places = [(layer, m) for layer in range(NUM_LAYERS) for m in targeted]
            a = {p: torch.randn(rank, IN_FEATURES).to(dtype) for p in places}
            b = {p: (torch.randn(WIDTHS[p[1]], rank) * rank**-0.5).to(dtype) for p in places}
            self.weights.append(AdapterWeights(a, b, dtype))
            images.append(pack_image(self.weights[-1], SPEC, PAGE_BYTES))
        num_pages = [image.num_pages for image in images]
        order = torch.randperm(sum(num_pages)) + 1
        pool = torch.full((sum(num_pages) + 1, PAGE_BYTES), 0xFF, dtype=torch.uint8)
        tables = np.zeros((len(segments), max(num_pages)), np.int32)
        used = 0
        for index, image in enumerate(images):
            pages = order[used : used + image.num_pages]
            pool[pages] = image.pages
            tables[index, : image.num_pages] = pages.numpy()
            used += image.num_pages
        self.indptr = np.cumsum([0, *(rows for rows, _ in segments)]).astype(np.int32)
        items, pages = plan_items(self.indptr, tables, np.array(num_pages))
        self.pool, self.items, self.pages = pool.cuda(), to_cuda(items), to_cuda(pages)
        # Graphs have room for more items than there are; those must not be looked at.
        surplus = torch.full((5, 4), 1 << 20, dtype=torch.int32, device="cuda")
        self.num_items = torch.tensor([len(items)], dtype=torch.int32, device="cuda")
        self.items = torch.cat([self.items, surplus])
        self.scratch = shrink_scratch(torch.device("cuda"))
        self.scratch.partials.fill_(torch.nan)
        num_rows = int(self.indptr[-1]) + num_base_rows
        self.x = torch.randn(num_rows, IN_FEATURES).to(dtype).cuda()
        self.y = torch.randn(num_rows, OFFSETS[-1]).mul(30).to(dtype).cuda()

    def run(self) -> torch.Tensor:
        y = self.y.clone()
        shape = len(y), len(WIDTHS), MAX_RANK
        v = torch.full(shape, torch.nan, device="cuda")
        plan = self.pool, self.items, self.num_items, self.pages, LAYER, [0, 1, 2], 3
        native.cuda_lora_shrink(v, self.x, self.scratch.partials, self.scratch.flags, *plan)
        native.cuda_lora_expand(y, v, *plan, OFFSETS)
        torch.cuda.synchronize()
        return y

    def exact(self) -> torch.Tensor:
        y = self.y.double().cpu()
        x = self.x.double().cpu()
        for index, weights in enumerate(self.weights):
            rows = slice(self.indptr[index], self.indptr[index + 1])
            for m in range(len(WIDTHS)):
                if (LAYER, m) in weights.a:
                    a, b = weights.a[LAYER, m].double(), weights.b[LAYER, m].double()
                    y[rows, OFFSETS[m] : OFFSETS[m + 1]] += x[rows] @ a.T @ b.T
        return y


def to_cuda(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).cuda()


def check(case: Case) -> None:
    exact, result = case.exact(), case.run().double().cpu()
    floor = (exact.to(case.dtype).double() - exact).norm()
    error = (result - exact).norm()
    assert error <= floor * ERROR_PER_FLOOR[case.dtype], f"{error / floor:.3f} times the floor"
    base = slice(int(case.indptr[-1]), None)
    assert torch.equal(result[base], case.y[base].double().cpu())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rank", [1, 3, 8, 9, 16, 24, 32, 64, 100, 128, 256])
@pytest.mark.parametrize("rows", [1, 8, 9, 64, 65, 200])
def test_one_adapter(dtype: torch.dtype, rank: int, rows: int) -> None:
    check(Case([(rows, rank)], num_base_rows=3, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_adapters", [2, 16, 64, 256])
def test_mixed_ranks_and_rows(dtype: torch.dtype, num_adapters: int) -> None:
    ranks, rows = [1, 8, 16, 12, 64, 5, 32], [1, 1, 3, 1, 70, 0, 1, 9]
    segments = [(rows[i % 8], ranks[i % 7]) for i in range(num_adapters)]
    check(Case(segments, num_base_rows=4, dtype=dtype))


def test_no_items() -> None:
    case = Case([(2, 8)], num_base_rows=2, dtype=torch.bfloat16)
    case.num_items.zero_()
    assert torch.equal(case.run(), case.y)


def test_runs_are_alike() -> None:
    case = Case([(1, 16)] * 40 + [(100, 64)], num_base_rows=4, dtype=torch.bfloat16)
    first = case.run()
    assert all(torch.equal(case.run(), first) for _ in range(5))
