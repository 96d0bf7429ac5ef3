"""LoRA products against dense algebra in float64, through a packer of this file's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch

from loraplex.lora import ops, reference
from loraplex.lora.image import AdapterWeights, pack_image
from loraplex.lora.spec import BaseModelSpec, LoRAModule

NUM_MODULES = 7
NUM_LAYERS = 2
DTYPES = [torch.float32, torch.bfloat16]
# The greatest relative error that rounding to the type can make, and what sums in float32 may add.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
SUMMING = 1e-6


@dataclass
class Adapter:
    """Dense matrices by (layer, module): A [rank, in], B [out, rank]."""

    a: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    b: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)


def random_adapter(
    ranks: dict[int, int], in_features: int, widths: dict[int, int], dtype: torch.dtype
) -> Adapter:
    adapter = Adapter()
    for layer in range(NUM_LAYERS):
        for module, rank in ranks.items():
            adapter.a[layer, module] = torch.randn(rank, in_features).to(dtype)
            adapter.b[layer, module] = torch.randn(widths[module], rank).to(dtype)
    return adapter


def pack(adapter: Adapter, dtype: torch.dtype, page_bytes: int) -> torch.Tensor:
    """The image [num_pages, page_bytes], written tile by tile from the format's definition."""
    itemsize = dtype.itemsize
    tile_bytes = 8 * 64 * itemsize
    tiles_per_page = page_bytes // tile_bytes
    header = torch.zeros(NUM_LAYERS, NUM_MODULES, 4, dtype=torch.int32)
    tiles = []
    num_header_tiles = -(-header.numel() * 4 // tile_bytes)
    for (layer, module), a in adapter.a.items():
        b = adapter.b[layer, module]
        first_tiles = []
        for matrix in (a, b.T):
            first_tiles.append(num_header_tiles + len(tiles))
            rank, columns = matrix.shape
            for i in range(0, rank, 8):
                for j in range(0, columns, 64):
                    tile = torch.zeros(8, 64, dtype=dtype)
                    part = matrix[i : i + 8, j : j + 64]
                    tile[: part.shape[0], : part.shape[1]] = part
                    tiles.append(tile)
        header[layer, module] = torch.tensor([*first_tiles, a.shape[0], 0])
    num_tiles = num_header_tiles + len(tiles)
    image = torch.full((-(-num_tiles // tiles_per_page), page_bytes), 0xFF, dtype=torch.uint8)
    header_bytes = header.flatten().view(torch.uint8)
    image[0, : header_bytes.numel()] = header_bytes
    for index, tile in enumerate(tiles, num_header_tiles):
        begin = index % tiles_per_page * tile_bytes
        image[index // tiles_per_page, begin : begin + tile_bytes] = tile.view(torch.uint8).view(-1)
    return image


class Case:
    """A batch with its pool; adapters sit in shuffled pages amid pages of NaN."""

    def __init__(
        self,
        adapters: list[Adapter],
        rows: list[int],
        in_features: int,
        widths: dict[int, int],
        modules: list[int],
        dtype: torch.dtype,
        max_rank: int,
        base_rows: int = 2,
        tiles_per_page: int = 3,
    ) -> None:
        page_bytes = tiles_per_page * 8 * 64 * dtype.itemsize + 64
        images = [pack(adapter, dtype, page_bytes) for adapter in adapters]
        self.pool, self.page_tables = place(images)
        self.adapters, self.rows, self.modules, self.dtype = adapters, rows, modules, dtype
        self.segment_indptr = torch.tensor([0, *rows], dtype=torch.int32).cumsum(0).int()
        num_tokens = sum(rows) + base_rows
        self.x = torch.randn(num_tokens, in_features).to(dtype)
        self.v = torch.full((num_tokens, len(modules), max_rank), torch.nan)
        self.offsets = [0]
        for module in modules:
            self.offsets.append(self.offsets[-1] + widths[module])
        self.y = torch.randn(num_tokens, self.offsets[-1]).to(dtype)

    def arguments(self, layer: int) -> tuple:
        return (self.pool, self.segment_indptr, self.page_tables, layer, self.modules, NUM_MODULES)

    def run(self, layer: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        v, y = self.v.clone(), self.y.clone()
        ops.shrink(v, self.x, *self.arguments(layer))
        ops.expand(y, v, *self.arguments(layer), self.offsets)
        return v, y

    def segments(self) -> Iterator[tuple[Adapter, slice]]:
        bounds = self.segment_indptr.tolist()
        for adapter, begin, end in zip(self.adapters, bounds, bounds[1:], strict=False):
            yield adapter, slice(begin, end)

    def check(self, layer: int = 1) -> None:
        v, y = self.run(layer)
        expected = self.y.clone()
        size = self.y.double().abs()
        for adapter, rows in self.segments():
            for m, module in enumerate(self.modules):
                if (layer, module) not in adapter.a:
                    continue
                a, b = adapter.a[layer, module].double(), adapter.b[layer, module].double()
                x = self.x[rows].double()
                got = v[rows, m, : a.shape[0]].double()
                assert_close(got, x @ a.T, x.abs() @ a.T.abs(), SUMMING)
                columns = slice(self.offsets[m], self.offsets[m + 1])
                exact = self.y[rows, columns].double() + got @ b.T
                size[rows, columns] += got.abs() @ b.T.abs()
                error = (y[rows, columns].double() - exact).abs()
                bound = exact.abs() * ROUNDING[self.dtype] + size[rows, columns] * SUMMING
                assert (error <= bound).all(), f"{(error / bound).max():.2f} times the bound"
                expected[rows, columns] = y[rows, columns]
        assert torch.equal(y, expected), "columns or rows without an adapter were touched"


def place(images: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """A pool with the images' pages in random places, and the page tables."""
    num_pages = sum(len(image) for image in images) + 3
    pool = torch.full((num_pages, images[0].shape[1]), 0xFF, dtype=torch.uint8)
    free = (torch.randperm(num_pages - 1) + 1).tolist()
    unused = 2**31 - 1
    tables = torch.full((len(images), max(map(len, images)) + 1), unused, dtype=torch.int32)
    for row, image in zip(tables, images, strict=True):
        for index, page in enumerate(image):
            row[index] = free.pop()
            pool[row[index]] = page
    return pool, tables


def assert_close(got: torch.Tensor, exact: torch.Tensor, size: torch.Tensor, bound: float) -> None:
    """size: the sum of the magnitudes of what was added up."""
    error = ((got - exact).abs() / size.clamp_min(1e-30)).max().item() if got.numel() else 0.0
    assert error <= bound, f"relative error {error:.2e}"


def simple_case(
    dtype: torch.dtype,
    ranks: list[int],
    rows: list[int],
    in_features: int = 192,
    width: int = 128,
    max_rank: int = 0,
) -> Case:
    """One module, an adapter of each of the ranks."""
    adapters = [random_adapter({3: r}, in_features, {3: width}, dtype) for r in ranks]
    return Case(adapters, rows, in_features, {3: width}, [3], dtype, max_rank or max(ranks))


@pytest.fixture(autouse=True)
def seed(one_thread: None) -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 2, 7, 8, 9, 16, 33, 64, 128, 256])
def test_ranks(isa: str, dtype: torch.dtype, rank: int) -> None:
    simple_case(dtype, [rank], [5]).check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_counts(isa: str, dtype: torch.dtype) -> None:
    rows = [*range(1, 8), 11, 63, 64, 65, 131]
    simple_case(dtype, [11] * len(rows), rows, in_features=70, width=70).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("in_features", "width"),
    [(1, 200), (8, 1), (63, 17), (64, 64), (65, 63), (100, 65), (576, 100)],
)
def test_widths_that_do_not_fill_tiles(
    isa: str, dtype: torch.dtype, in_features: int, width: int
) -> None:
    simple_case(dtype, [12], [4], in_features, width).check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_ranks_empty_segments_and_room_for_larger_ranks(isa: str, dtype: torch.dtype) -> None:
    simple_case(dtype, [3, 64, 16, 1, 20], [1, 0, 7, 3, 0], max_rank=70).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("targets", [[0, 1, 2], [0], [1], [0, 2], [4], []])
def test_fused_group_of_which_adapters_target_some(
    isa: str, dtype: torch.dtype, targets: list[int]
) -> None:
    widths = {0: 192, 1: 64, 2: 72, 4: 64}
    some = random_adapter({m: 4 + m for m in targets}, 96, widths, dtype)
    full = random_adapter({0: 8, 1: 16, 2: 3}, 96, widths, dtype)
    case = Case([some, full], [3, 2], 96, widths, [0, 1, 2], dtype, max_rank=16)
    case.check(layer=0)
    case.check(layer=1)


@pytest.mark.parametrize("tiles_per_page", [1, 2, 5, 64])
def test_page_sizes(tiles_per_page: int) -> None:
    adapters = [random_adapter({2: 24}, 320, {2: 200}, torch.bfloat16) for _ in range(2)]
    Case(adapters, [4, 3], 320, {2: 200}, [2], torch.bfloat16, 24,
         tiles_per_page=tiles_per_page).check()  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_twin(dtype: torch.dtype) -> None:
    widths = {0: 192, 1: 64, 2: 72}
    adapters = [random_adapter({0: 9, 2: 16}, 96, widths, dtype) for _ in range(3)]
    case = Case(adapters, [3, 0, 2], 96, widths, [0, 1, 2], dtype, max_rank=16)
    v, y = case.run()
    twin_v, twin_y = case.v.clone(), case.y.clone()
    reference.shrink(twin_v, case.x, *case.arguments(1))
    reference.expand(twin_y, v, *case.arguments(1), case.offsets)
    torch.testing.assert_close(v, twin_v, rtol=1e-5, atol=1e-4, equal_nan=True)
    torch.testing.assert_close(y, twin_y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_images_of_the_engine_s_packer(dtype: torch.dtype) -> None:
    widths = {0: 192, 1: 64, 2: 72}
    adapters = [random_adapter({0: 9, 2: 16}, 96, widths, dtype) for _ in range(3)]
    case = Case(adapters, [3, 0, 2], 96, widths, [0, 1, 2], dtype, max_rank=16)
    v, y = case.run()
    modules = tuple(LoRAModule(str(m), str(m), 96, widths.get(m, 64)) for m in range(NUM_MODULES))
    spec = BaseModelSpec("llama", NUM_LAYERS, modules)
    page_bytes = case.pool.shape[1]
    case.pool, case.page_tables = place(
        [pack_image(AdapterWeights(a.a, a.b, dtype), spec, page_bytes).pages for a in adapters]
    )
    packed_v, packed_y = case.run()
    assert torch.equal(packed_y, y)
    assert torch.equal(packed_v.nan_to_num(7.0), v.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_company(isa: str, dtype: torch.dtype) -> None:
    case = simple_case(dtype, [16, 9, 40], [70, 4, 1], in_features=200, width=136)
    v, y = case.run()
    for index, (_, rows) in enumerate(case.segments()):
        for row in range(rows.start, rows.stop):
            lone_v, lone_y = case.v[row : row + 1].clone(), case.y[row : row + 1].clone()
            indptr = torch.tensor([0, 1], dtype=torch.int32)
            arguments = (case.pool, indptr, case.page_tables[index : index + 1], 1, [3], 7)
            ops.shrink(lone_v, case.x[row : row + 1], *arguments)
            ops.expand(lone_y, lone_v, *arguments, case.offsets)
            assert torch.equal(lone_y[0], y[row])
            assert torch.equal(lone_v[0].nan_to_num(7.0), v[row].nan_to_num(7.0))


def test_result_does_not_depend_on_the_number_of_threads(isa: str) -> None:
    case = simple_case(torch.bfloat16, [16, 64, 33], [100, 4, 1], in_features=576, width=576)
    results = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        results.append(case.run()[1])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_strided_views_and_scratch_for_adapter_rows_alone() -> None:
    case = simple_case(torch.bfloat16, [8, 16], [3, 2])
    _, expected = case.run()
    wide_x, wide_y = torch.randn(7, 500).bfloat16(), torch.randn(7, 300).bfloat16()
    x, y = wide_x[:, 100:292], wide_y[:, 50:178]
    x.copy_(case.x)
    y.copy_(case.y)
    before = wide_y.clone()
    v = torch.empty(5, 3, 16)[:, :1]
    ops.shrink(v, x, *case.arguments(1))
    ops.expand(y, v, *case.arguments(1), case.offsets)
    assert torch.equal(y, expected)
    before[:, 50:178] = y
    assert torch.equal(wide_y, before)


def test_no_segments() -> None:
    case = simple_case(torch.float32, [8], [2])
    y = case.y.clone()
    indptr, tables = torch.zeros(1, dtype=torch.int32), torch.zeros(0, 1, dtype=torch.int32)
    arguments = (case.pool, indptr, tables, 0, [3], NUM_MODULES)
    ops.shrink(case.v, case.x, *arguments)
    ops.expand(y, case.v, *arguments, case.offsets)
    assert torch.equal(y, case.y)


class TestErrors:
    @pytest.fixture
    def case(self) -> Case:
        return simple_case(torch.bfloat16, [8, 16], [3, 2])

    def shrink(self, case: Case, **changes: object) -> None:
        names = ("v", "x", "pool", "segment_indptr", "page_tables", "layer", "modules",
                 "num_modules")  # fmt: skip
        arguments = dict(zip(names, (case.v, case.x, *case.arguments(1)), strict=True))
        ops.shrink(**(arguments | changes))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"x": torch.zeros(7, 192, dtype=torch.float16)}, "shrink: x must be of type bfloat16"),
            ({"v": torch.zeros(7, 2, 16)}, r"v must have shape \[\*, 1, \*\], got \[7, 2, 16\]"),
            ({"v": torch.zeros(4, 1, 16)}, "ends with 5, more than the 4 rows"),
            ({"v": torch.zeros(7, 1, 12)}, "segment 1 has rank 16, allowed is 0 to 12"),
            ({"segment_indptr": torch.tensor([0, 4, 2], dtype=torch.int32)}, "not decrease"),
            ({"segment_indptr": torch.tensor([1, 4, 5], dtype=torch.int32)}, "begin with 0"),
            ({"segment_indptr": torch.tensor([0, 3, 5])}, "segment_indptr must be of type int32"),
            ({"page_tables": torch.zeros(1, 9, dtype=torch.int32)}, r"page_tables must have shape"),
            ({"page_tables": torch.full((2, 9), 99, dtype=torch.int32)}, "segment 0 lacks page 0"),
            ({"modules": [7]}, r"modules\[0\] is 7, allowed is 0 to 6"),
            ({"layer": 1000}, "layer 1000 is outside the header"),
            ({"layer": -1}, "layer"),
        ],
    )
    def test_bad_shrink(self, case: Case, changes: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            self.shrink(case, **changes)

    def test_missing_page(self, case: Case) -> None:
        case.page_tables[1, 4] = -1
        with pytest.raises(ValueError, match="segment 1 lacks page 4"):
            self.shrink(case)

    @pytest.mark.parametrize("offsets", [[0], [0, 129], [-1, 128], [5, 4], [0, 64, 128]])
    def test_bad_offsets(self, case: Case, offsets: list[int]) -> None:
        with pytest.raises(ValueError, match="offsets must be 2 increasing columns of y"):
            ops.expand(case.y, case.v, *case.arguments(1), offsets)
