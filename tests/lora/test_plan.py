"""What the CUDA kernels are told to do: every row of a segment in one item, with its own pages."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex.lora import plan
from loraplex.lora.plan import FINE_ITEM_ROWS, ITEM_ROWS, MAX_FINE_ROWS, max_items, plan_items

KERNELS = Path(__file__).parents[2] / "csrc" / "cuda" / "kernels.h"


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 5)), min_size=1, max_size=20))
def test_items_cover_each_row_once_with_its_adapters_pages(
    segments: list[tuple[int, int]],
) -> None:
    indptr = np.cumsum([0, *(rows for rows, _ in segments)]).astype(np.int32)
    num_pages = np.array([count for _, count in segments], np.int32)
    tables = np.arange(1, 5 * len(segments) + 1, dtype=np.int32).reshape(-1, 5)

    items, pages = plan_items(indptr, tables, num_pages)

    num_rows = int(indptr[-1])
    assert len(items) <= max_items(len(segments), num_rows)
    covered = [row for begin, end, _, _ in items for row in range(begin, end)]
    assert covered == list(range(num_rows))
    most = FINE_ITEM_ROWS if num_rows <= MAX_FINE_ROWS else ITEM_ROWS
    for begin, end, first_page, header_page in items:
        segment = int(np.searchsorted(indptr, begin, side="right")) - 1
        assert end <= indptr[segment + 1] and end - begin <= most
        own = pages[first_page : first_page + num_pages[segment]]
        assert header_page == own[0]
        assert own.tolist() == tables[segment, : num_pages[segment]].tolist()


@pytest.mark.parametrize(
    ("name", "constant"),
    [("kItemRows", "ITEM_ROWS"), ("kMaxFineRows", "MAX_FINE_ROWS"), ("kMaxRank", "MAX_RANK")],
)
def test_the_kernels_are_made_for_such_items(name: str, constant: str) -> None:
    [value] = re.findall(rf"constexpr int {name} = (\d+);", KERNELS.read_text())
    assert int(value) == getattr(plan, constant)
