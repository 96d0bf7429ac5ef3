"""The packed image against the definition of its format, and unpacking as its inverse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.benchmarks.synthetic_adapters import llama_spec
from loraplex.lora import ops
from loraplex.lora.image import (
    AdapterImage,
    AdapterWeights,
    image_num_pages,
    layout_image,
    pack_image,
    unpack_image,
)
from loraplex.lora.spec import BaseModelSpec, LoRAModule

DTYPES = [torch.float32, torch.bfloat16]


def random_weights(
    spec: BaseModelSpec, ranks: dict[tuple[int, int], int], dtype: torch.dtype
) -> AdapterWeights:
    generator = torch.Generator().manual_seed(0)
    weights = AdapterWeights({}, {}, dtype)
    for place, rank in ranks.items():
        module = spec.modules[place[1]]
        experts = [module.num_experts] if module.num_experts > 1 else []
        a = torch.randn(*experts, rank, module.in_features, generator=generator)
        b = torch.randn(*experts, module.out_features, rank, generator=generator)
        weights.a[place], weights.b[place] = a.to(dtype), b.to(dtype)
        if rank % 5 == 1:
            vectors = torch.randn(2, module.out_features, generator=generator)
            weights.gains[place], weights.offsets[place] = vectors
    return weights


def assert_same(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for place, tensor in left.items():
        assert torch.equal(tensor, right[place]), place


@st.composite
def packing_cases(draw):
    num_layers = draw(st.integers(1, 4))
    features = st.integers(1, 200)
    modules = tuple(
        LoRAModule(f"m{i}", f"m{i}", draw(features), draw(features), draw(st.integers(1, 3)))
        for i in range(draw(st.integers(1, 3)))
    )
    spec = BaseModelSpec("Any", num_layers, modules)
    places = [(layer, module) for layer in range(num_layers) for module in range(len(modules))]
    ranks = draw(st.dictionaries(st.sampled_from(places), st.integers(1, 40), min_size=1))
    dtype = draw(st.sampled_from(DTYPES))
    tile_bytes = 512 * dtype.itemsize
    page_bytes = draw(st.integers(1, 9)) * tile_bytes + draw(st.sampled_from([0, 64, 500, 1020]))
    return spec, ranks, dtype, page_bytes


@settings(deadline=None, max_examples=150)
@given(packing_cases())
def test_unpacking_is_the_inverse_of_packing(case):
    spec, ranks, dtype, page_bytes = case
    weights = random_weights(spec, ranks, dtype)
    image = pack_image(weights, spec, page_bytes)
    assert image.num_bytes == image.num_pages * page_bytes
    if not weights.gains:
        assert image.num_pages == image_num_pages(ranks, spec, page_bytes, dtype.itemsize)
    assert image.traits.max_rank == max(ranks.values())
    unpacked = unpack_image(image, spec)
    assert_same(unpacked.a, weights.a)
    assert_same(unpacked.b, weights.b)
    assert_same(unpacked.gains, weights.gains)
    assert_same(unpacked.offsets, weights.offsets)


@settings(deadline=None, max_examples=50)
@given(packing_cases())
def test_tiles_are_where_the_format_says(case):
    """Element by element, by the words of the module's docstring."""
    spec, ranks, dtype, page_bytes = case
    weights = random_weights(spec, ranks, dtype)
    image = pack_image(weights, spec, page_bytes)
    tile_bytes = 512 * dtype.itemsize
    tiles_per_page = page_bytes // tile_bytes
    claimed = set(range(-(-spec.num_layers * spec.num_modules * 16 // tile_bytes)))

    def tile(number):
        assert number not in claimed
        claimed.add(number)
        start = number // tiles_per_page * page_bytes + number % tiles_per_page * tile_bytes
        return image.buffer[start : start + tile_bytes].clone().view(dtype).view(8, 64)

    header = image.buffer[: spec.num_layers * spec.num_modules * 16].view(torch.int32)
    header = header.view(spec.num_layers, spec.num_modules, 4).tolist()
    for layer in range(spec.num_layers):
        for module_id in range(spec.num_modules):
            a_tile, b_tile, rank, vector_tile = header[layer][module_id]
            place = layer, module_id
            assert rank == ranks.get(place, 0)
            assert (vector_tile > 0) == (place in weights.gains)
            if vector_tile > 0:
                num_tiles = -(-spec.modules[module_id].out_features * 4 // tile_bytes)
                for i, vector in enumerate((weights.gains[place], weights.offsets[place])):
                    first = vector_tile + i * num_tiles
                    found = torch.cat([tile(first + j).reshape(-1) for j in range(num_tiles)])
                    found = found.view(torch.float32)
                    assert torch.equal(found[: len(vector)], vector)
                    assert not found[len(vector) :].any()
            if rank == 0:
                continue
            for number, matrices in ((a_tile, weights.a[place]), (b_tile, weights.b[place].mT)):
                for matrix in matrices if matrices.dim() == 3 else matrices[None]:
                    for i in range(-(-rank // 8)):
                        for j in range(-(-matrix.shape[1] // 64)):
                            expected = torch.zeros(8, 64, dtype=dtype)
                            part = matrix[8 * i : 8 * i + 8, 64 * j : 64 * j + 64]
                            expected[: part.shape[0], : part.shape[1]] = part
                            assert torch.equal(tile(number), expected)
                            number += 1
    assert claimed == set(range(len(claimed))), "no tile is wasted"
    assert image.num_pages == -(-len(claimed) // tiles_per_page)


def test_no_stale_memory_is_left_in_an_image():
    spec = llama_spec()
    weights = random_weights(spec, {(0, 0): 3}, torch.bfloat16)
    image = pack_image(weights, spec, page_bytes=5 * 1024 + 8)
    values = weights.a[0, 0].numel() + weights.b[0, 0].numel()
    num_nonzero = int((image.buffer[1024:].numpy() != 0).sum())
    assert num_nonzero <= 2 * values


def test_size_of_a_real_adapter():
    """SmolLM2-135M, rank 16 on all linears, 16 tokens a page."""
    spec = llama_spec(num_layers=30, hidden=576, kv_size=192, intermediate=1536)
    ranks = {(layer, module): 16 for layer in range(30) for module in range(7)}
    page_bytes = 30 * 2 * 16 * 3 * 64 * 2
    layout = layout_image(ranks, spec, page_bytes, itemsize=2)
    rows = sum(-(-m.in_features // 64) + -(-m.out_features // 64) for m in spec.modules)
    assert layout.num_tiles == 4 + 30 * 2 * rows
    assert layout.num_pages == -(-layout.num_tiles // 360) == 27
    assert layout.header.dtype == np.int32


@pytest.mark.parametrize("page_bytes", [100, 2 * 1024])
def test_a_page_too_small_for_the_header_is_refused(page_bytes):
    spec = llama_spec(num_layers=20)
    with pytest.raises(ValueError, match=rf"page_bytes={page_bytes} .* raise block_size"):
        image_num_pages({(0, 0): 1}, spec, page_bytes, itemsize=2)


def test_the_header_may_fill_its_page_exactly():
    spec = llama_spec(num_layers=20)
    ranks = {(19, 6): 5}
    weights = random_weights(spec, ranks, torch.bfloat16)
    image = pack_image(weights, spec, page_bytes=3 * 1024)
    assert isinstance(image, AdapterImage)
    assert_same(unpack_image(image, spec).b, weights.b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_read_the_image_as_it_is_packed(dtype):
    """Two adapters at shuffled pages of one pool, through the native ops."""
    spec = llama_spec()
    page_bytes = 7 * 512 * dtype.itemsize + 64
    qkv, widths, layer = [0, 1, 2], [64, 32, 32], 1
    rank_lists = [{0: 12, 1: 3}, {1: 8, 2: 17}]
    adapters = [
        random_weights(spec, {(layer, module): rank for module, rank in ranks.items()}, dtype)
        for ranks in rank_lists
    ]
    images = [pack_image(weights, spec, page_bytes) for weights in adapters]
    total = sum(image.num_pages for image in images)
    free = (torch.randperm(total, generator=torch.Generator().manual_seed(0)) + 1).tolist()
    pool = torch.zeros(total + 1, page_bytes, dtype=torch.uint8)
    tables = torch.zeros(2, max(image.num_pages for image in images), dtype=torch.int32)
    for segment, image in enumerate(images):
        pages, free = free[: image.num_pages], free[image.num_pages :]
        pool[pages] = image.pages
        tables[segment, : len(pages)] = torch.tensor(pages, dtype=torch.int32)

    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = torch.zeros(5, sum(widths), dtype=dtype)
    shrunk = torch.zeros(4, len(qkv), 17)
    where = pool, torch.tensor([0, 3, 4], dtype=torch.int32), tables, layer, qkv, spec.num_modules
    ops.shrink(shrunk, x, *where)
    ops.expand(y, shrunk, *where, [0, 64, 96, 128])

    expected = torch.zeros(5, sum(widths))
    for row, segment in enumerate([0, 0, 0, 1]):
        for module, columns in enumerate(expected[row].split(widths)):
            if module in rank_lists[segment]:
                a = adapters[segment].a[layer, module].float()
                b = adapters[segment].b[layer, module].float()
                columns += b @ (a @ x[row].float())
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(y.float(), expected, rtol=tolerance, atol=1e-4)
