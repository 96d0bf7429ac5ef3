"""Segments of adapters: what is kept from step to step, and what must not be."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from loraplex.engine.runner.input_batch import _Segments
from loraplex.lora.spec import AdapterTraits


def load(adapter, pages: list[int], max_rank: int = 8) -> None:
    adapter.pages = pages
    adapter.page_table = np.array(pages, np.int32)
    adapter.traits = AdapterTraits(max_rank, module_mask=1, vector_mask=max_rank % 2)


def requests_of(*adapters):
    return [SimpleNamespace(adapter=adapter) for adapter in adapters]


def test_segments_follow_the_adapters():
    a, b = SimpleNamespace(), SimpleNamespace()
    load(a, [3, 4, 9])
    load(b, [5], max_rank=9)
    segments = _Segments()

    first = segments.build(requests_of(a, a, b), np.array([0, 1, 4, 6], np.int32))
    assert first["segment_indptr"].tolist() == [0, 4, 6]
    assert first["page_tables"].tolist() == [[3, 4, 9], [5, 0, 0]]
    assert (first["max_rank"], first["vector_mask"]) == (9, 1)

    again = segments.build(requests_of(a, b, b), np.array([0, 1, 2, 3, 7], np.int32))
    assert again["segment_indptr"].tolist() == [0, 1, 3]
    assert again["page_tables"] is first["page_tables"], "nothing is computed twice"

    load(b, [6, 7])
    reloaded = segments.build(requests_of(a, b), np.array([0, 1, 2], np.int32))
    assert reloaded["page_tables"].tolist() == [[3, 4, 9], [6, 7, 0]]
    assert (reloaded["max_rank"], reloaded["vector_mask"]) == (8, 0)
    assert first["page_tables"].tolist() == [[3, 4, 9], [5, 0, 0]], "a step in flight has its own"

    assert segments.build([], np.array([0, 1], np.int32))["page_tables"].shape == (0, 0)
    assert segments.build(requests_of(a), np.array([0, 1], np.int32))["max_rank"] == 8
