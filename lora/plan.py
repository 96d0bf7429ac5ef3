"""Plans the CUDA kernels' work of a step: cuts rows into items. No torch; runs on the host.

An item is up to ITEM_ROWS rows with one adapter: int32 (row_begin, row_end, first_page,
pages[first_page]), where the adapter's pages are pages[first_page], pages[first_page + 1], ...
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]

ITEM_ROWS = 32
# Few rows are cut finer, so that more multiprocessors take part: reading an adapter again from the
# cache costs less than waiting for the few that read it once.
FINE_ITEM_ROWS = 8
MAX_FINE_ROWS = 512
ITEM_FIELDS = 4
# Sizes of the kernels' scratch: the largest rank, the sums that a block of shrink hands to another,
# and blocks that may do so, of which no GPU holds more at once.
MAX_RANK = 256
SHRINK_SUMS = ITEM_ROWS * MAX_RANK
NUM_SHRINK_BLOCKS = 512


def max_items(max_num_requests: int, max_num_tokens: int) -> int:
    """Items of a step, at most."""
    coarse = -(-max_num_tokens // ITEM_ROWS)
    fine = -(-min(max_num_tokens, MAX_FINE_ROWS) // FINE_ITEM_ROWS)
    return max_num_requests + max(coarse, fine)


def plan_items(
    segment_indptr: Int32Array, page_tables: Int32Array, num_pages: Int32Array
) -> tuple[Int32Array, Int32Array]:
    """(items [num_items, ITEM_FIELDS], pages [sum of num_pages]) of a step's segments.

    segment_indptr [S + 1]; page_tables [S, most pages]; num_pages [S], of each segment's adapter.
    """
    rows = np.diff(segment_indptr)
    item_rows = FINE_ITEM_ROWS if segment_indptr[-1] <= MAX_FINE_ROWS else ITEM_ROWS
    items_of = -(-rows // item_rows)
    segment = np.repeat(np.arange(len(rows)), items_of)
    index = np.arange(len(segment)) - np.repeat(np.cumsum(items_of) - items_of, items_of)
    begin = segment_indptr[segment] + index * item_rows
    items = np.zeros((len(segment), ITEM_FIELDS), np.int32)
    items[:, 0] = begin
    items[:, 1] = np.minimum(begin + item_rows, segment_indptr[segment + 1])
    items[:, 2] = (np.cumsum(num_pages) - num_pages)[segment]
    items[:, 3] = page_tables[segment, 0]
    is_used = np.arange(page_tables.shape[1]) < num_pages[:, None]
    return items, page_tables[is_used]
