"""Memory of one tensor after another."""

from __future__ import annotations

import torch

from loraplex.engine.models.reused_memory import ReusedMemory


def test_memory_is_given_again_when_its_tensors_are_gone():
    memory = ReusedMemory()
    first = memory.empty((3, 1000), torch.bfloat16)
    assert first.shape == (3, 1000) and first.dtype == torch.bfloat16
    address, row = first.data_ptr(), first[1]
    del first
    row.fill_(7)
    other = memory.empty((2000,), torch.float32)
    assert other.data_ptr() != address, "a view keeps it"
    other.fill_(1)
    assert (row == 7).all()
    large = other.data_ptr()
    del row, other
    assert memory.empty((2, 500), torch.float32).data_ptr() == large


def test_what_is_too_small_for_the_last_is_not_kept():
    memory = ReusedMemory()
    small = memory.empty((10,), torch.float32)
    large = memory.empty((1000,), torch.float32)
    del small
    assert not memory._free
    del large
    assert len(memory._free) == 1
