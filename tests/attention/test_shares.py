"""What the kernel for decoding relies on in its plan."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from loraplex.attention.shares import MIN_SHARE_PAGES, plan_shares

BLOCK_SIZE = 16


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=80), st.integers(1, 140))
def test_shares_are_equal_and_rows_know_theirs(lengths: list[int], num_blocks: int) -> None:
    seq_lens = np.array(lengths, np.int32)
    rows, shares = plan_shares(seq_lens, BLOCK_SIZE, num_blocks)
    assert rows.dtype == shares.dtype == np.int32
    num_pages = -(-seq_lens // BLOCK_SIZE)
    assert (rows[:, 1] - rows[:, 0] == num_pages).all()
    assert rows[0, 0] == 0
    assert (rows[1:, 0] == rows[:-1, 1]).all()
    assert (rows[:, 2] == seq_lens).all()

    used = shares[shares[:, 1] > shares[:, 0]]
    assert (shares[len(used) :] == 0).all()
    assert used[0, 0] == 0
    assert (used[1:, 0] == used[:-1, 1]).all()
    assert used[-1, 1] == num_pages.sum()
    sizes = used[:, 1] - used[:, 0]
    assert sizes.max() - sizes.min() <= 1
    assert len(used) == 1 or sizes.min() >= MIN_SHARE_PAGES
    assert len(used) == min(num_blocks, max(1, num_pages.sum() // MIN_SHARE_PAGES))

    row_of_page = np.repeat(np.arange(len(rows)), num_pages)
    share_of_page = np.repeat(np.arange(len(used)), sizes)
    assert (row_of_page[used[:, 0]] == used[:, 2]).all()
    for begin, end, _, packed in rows:
        own = np.unique(share_of_page[begin:end])
        assert (packed >> 16, packed & 0xFFFF) == (own[0], len(own))
