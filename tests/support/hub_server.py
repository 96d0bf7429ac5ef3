"""Fixtures: a hub without repositories, and a server in a thread that answers for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from loraplex.benchmarks.fake_hub import FakeHub
from loraplex.benchmarks.faulty_server import FaultyServer


@pytest.fixture
def hub() -> FakeHub:
    return FakeHub()


@pytest.fixture
def server(hub: FakeHub) -> Iterator[FaultyServer]:
    """Serves `hub`."""
    with FaultyServer(hub) as server:
        yield server
