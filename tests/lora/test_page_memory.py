"""Memory that is used again."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import torch

from loraplex.lora.page_memory import PageMemory, allocate_pages

SIZE = 1 << 20


def test_a_region_is_used_again_when_no_part_of_it_is_left():
    memory = PageMemory(max_spare=2)
    first = memory.allocate(SIZE)
    first.fill_(7)
    part, address = first[100:200].view(torch.int32), first.data_ptr()
    del first
    other = memory.allocate(SIZE)
    assert other.data_ptr() != address, "a part of it is in use"
    del part
    again = memory.allocate(SIZE - 1000)
    assert again.data_ptr() == address
    assert len(again) == SIZE - 1000
    assert (again == 7).all()


def test_regions_are_kept_up_to_a_number_and_others_released():
    prepared, released = [], []
    memory = PageMemory(
        2, prepare=lambda r: prepared.append(id(r)), release=lambda r: released.append(id(r))
    )
    tensors = [memory.allocate(SIZE) for _ in range(3)]
    assert len(prepared) == 3
    tensors.clear()
    assert len(released) == 1
    larger = memory.allocate(2 * SIZE)
    assert len(released) == 2, "nobody may ever ask for that size again"
    del larger
    memory.allocate(3 * SIZE)
    assert len(released) == 3
    del memory
    assert len(prepared) == 5
    assert set(released) == set(prepared)


def test_a_larger_region_will_do_up_to_the_excess():
    memory = PageMemory(max_spare=2, max_excess=4)
    first = memory.allocate(4 * SIZE)
    address = first.data_ptr()
    del first
    assert memory.allocate(SIZE).data_ptr() == address
    other = memory.allocate(SIZE // 2)
    assert other.data_ptr() != address
    assert len(other) == SIZE // 2


def test_what_outlives_the_memory_is_released_later():
    released = []
    memory = PageMemory(2, release=released.append)
    tensor = memory.allocate(SIZE)
    del memory
    assert tensor.fill_(1).all()
    del tensor
    assert len(released) == 1


def test_threads_never_share_a_region():
    memory = PageMemory(max_spare=3)
    errors = []

    def work(seed: int) -> None:
        rng, held = random.Random(seed), []
        for i in range(300):
            tensor = memory.allocate(rng.choice([5000, 9000, 70_000]))
            tensor.fill_(value := (seed * 31 + i) % 251)
            held.append((tensor, value))
            while len(held) > 3:
                tensor, value = held.pop(rng.randrange(len(held)))
                if not (tensor == value).all():
                    errors.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_pages_are_of_a_kind_that_the_system_makes_large():
    """Of memory that is shared, which looks the same, it makes none as a rule."""
    pages = allocate_pages(64 * SIZE)
    pages.fill_(1)
    address, is_there, facts = pages.data_ptr(), False, []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            is_there = begin <= address < end
        if is_there:
            facts.append(line)
    assert facts[0].split()[1] == "rw-p"
    if Path("/sys/kernel/mm/transparent_hugepage").exists():
        assert "hg" in facts[-1].removeprefix("VmFlags:").split()
