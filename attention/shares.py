"""Plans the kernel for requests that decode: equal shares of all their pages, one for each
multiprocessor. No torch; runs on the host.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]

# Of a share, at least: a row in more pieces takes longer to be put together than to be read.
MIN_SHARE_PAGES = 4
FIELDS = 4


def plan_shares(
    seq_lens: Int32Array, block_size: int, num_blocks: int
) -> tuple[Int32Array, Int32Array]:
    """(rows [num_rows, 4], shares [num_blocks, 4]) of a step, as native.cuda_decode_attention takes
    them; pages are counted through all rows.

    Of a row: its first page and the end of its pages, its tokens, first share << 16 | shares.
    Of a share: its first page and the end of its pages, its first row, 0. What has nothing to do
    has no pages.
    """
    ends = np.cumsum(-(-seq_lens // block_size))
    begins = np.concatenate([[0], ends[:-1]])
    num_shares = min(num_blocks, max(1, int(ends[-1]) // MIN_SHARE_PAGES))
    bounds = ends[-1] * np.arange(num_shares + 1) // num_shares
    first_shares = np.searchsorted(bounds, begins, "right") - 1
    last_shares = np.searchsorted(bounds, ends - 1, "right") - 1
    rows = np.empty((len(seq_lens), FIELDS), np.int32)
    rows[:, 0], rows[:, 1], rows[:, 2] = begins, ends, seq_lens
    rows[:, 3] = first_shares << 16 | (last_shares - first_shares + 1)
    shares = np.zeros((num_blocks, FIELDS), np.int32)
    own = shares[:num_shares]
    first_rows = np.searchsorted(ends, bounds[:-1], "right")
    own[:, 0], own[:, 1], own[:, 2] = bounds[:-1], bounds[1:], first_rows
    return rows, shares
