"""The adapter images in host memory, and which of them go when others need room.

Not thread-safe, and knows no files: the store that has it holds its lock around every call.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass

from loraplex.lora.image import AdapterImage
from loraplex.lora.spec import AdapterError


@dataclass(slots=True)
class HeldImage:
    """An image in host memory."""

    image: AdapterImage
    load_seconds: float
    read_interval: tuple[float, float]
    """When it was asked for, and was there."""
    awaited_until: float
    """Whoever asked for it has until then to copy it, before it may be dropped."""
    num_copies: int = 0
    """Copies in progress."""
    is_pinned: bool = False


class HeldImages:
    """Least recently used first to go."""

    def __init__(self, capacity_bytes: int, clock: Callable[[], float]) -> None:
        """capacity_bytes: memory for images. One that is larger is kept while it is needed."""
        self._capacity_bytes = capacity_bytes
        self._clock = clock
        self._held: OrderedDict[Hashable, HeldImage] = OrderedDict()
        self._full_until = 0.0  # Until then, or until a copy ends, no image can be dropped.
        self._num_added = self._added_bytes = 0
        self.num_bytes = 0
        self.num_drops = 0
        """Of those that went to make room."""

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._held)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._held

    def __getitem__(self, key: Hashable) -> HeldImage:
        return self._held[key]

    def use(self, key: Hashable) -> HeldImage | None:
        """The image, if it is here, which is now the most recently used."""
        held = self._held.get(key)
        if held is not None:
            self._held.move_to_end(key)
        return held

    def add(self, key: Hashable, held: HeldImage) -> None:
        self._held[key] = held
        self.num_bytes += held.image.num_bytes
        self._num_added += 1
        self._added_bytes += held.image.num_bytes

    def drop(self, key: Hashable) -> None:
        """The image goes, if it is here. A copy that is under way goes on."""
        held = self._held.pop(key, None)
        if held is not None:
            self.num_bytes -= held.image.num_bytes
            self._full_until = 0.0

    def pin(self, key: Hashable) -> None:
        """Keep an image until `unpin` or `drop`. Raises AdapterError if there is no room."""
        held = self._held[key]
        num_bytes = held.image.num_bytes
        num_pinned = sum(h.image.num_bytes for h in self._held.values() if h.is_pinned)
        if not held.is_pinned and num_pinned + num_bytes > self._capacity_bytes:
            raise AdapterError(
                f"there is no room to pin the adapter in host memory: it takes {num_bytes} bytes, "
                f"pinned ones take {num_pinned}, and host_adapter_bytes is {self._capacity_bytes}",
                status=409,
            )
        held.is_pinned = True

    def unpin(self, key: Hashable) -> None:
        """The image may be dropped again, if it is here."""
        if key in self._held:
            self._held[key].is_pinned = False
            self._full_until = 0.0

    def end_copy(self, held: HeldImage) -> None:
        """Of an image that may have been dropped meanwhile."""
        held.num_copies -= 1
        held.awaited_until = self._full_until = 0.0

    def are_all_pinned(self) -> bool:
        return all(held.is_pinned for held in self._held.values())

    def have_room(self, num_reading: int) -> bool:
        """Whether so many that are being read, and one more, fit: an image's size is known when
        it is."""
        average_bytes = self._added_bytes / max(self._num_added, 1)
        return self.num_bytes + average_bytes * (num_reading + 1) <= self._capacity_bytes

    def make_room(self, num_reading: int) -> None:
        """Drop images until one more fits, as far as nobody waits for them or copies them."""
        now = self._clock()
        if now < self._full_until:
            return
        for key, held in list(self._held.items()):
            if self.have_room(num_reading):
                return
            if held.num_copies == 0 and held.awaited_until <= now and not held.is_pinned:
                self.drop(key)
                self.num_drops += 1
        ends = [h.awaited_until for h in self._held.values() if not (h.num_copies or h.is_pinned)]
        self._full_until = min(ends, default=math.inf)

    def check_integrity(self) -> None:
        assert self.num_bytes == sum(held.image.num_bytes for held in self._held.values())
        assert all(held.num_copies >= 0 for held in self._held.values())
