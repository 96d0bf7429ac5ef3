"""What has happened to adapters, by the names that requests gave them. No torch."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import asdict, dataclass

# Names beyond this many are forgotten, those first of which nothing has been heard for longest.
MAX_NUM_NAMES = 2048


@dataclass(slots=True)
class AdapterCounts:
    """Of one name, since the start."""

    hits: int = 0
    """Requests that found their adapter in the pool."""
    misses: int = 0
    """Requests that did not."""
    loads: int = 0
    """Copies into the pool."""
    evictions: int = 0
    """Times that its pages were reclaimed."""
    downloads: int = 0
    failures: int = 0
    """Requests that failed because it could not be had or served."""


class AdapterTally:
    """Counts for the names that were used last."""

    def __init__(self) -> None:
        self._counts: OrderedDict[str, AdapterCounts] = OrderedDict()

    def __getitem__(self, name: str) -> AdapterCounts:
        """The name's counts, to be counted up."""
        counts = self._counts.get(name)
        if counts is None:
            counts = self._counts[name] = AdapterCounts()
            if len(self._counts) > MAX_NUM_NAMES:
                self._counts.popitem(last=False)
        else:
            self._counts.move_to_end(name)
        return counts

    def as_dict(self) -> dict[str, dict[str, int]]:
        return {name: asdict(counts) for name, counts in self._counts.items()}
