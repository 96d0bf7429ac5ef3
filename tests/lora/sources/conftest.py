"""A hub in a thread, and fetchers that lose no time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import hub_server
import pytest

from loraplex.benchmarks.faulty_server import FaultyServer
from loraplex.lora.sources.fetcher import AdapterFetcher, SourceSettings

hub, server = hub_server.hub, hub_server.server


@pytest.fixture
def make_fetcher(tmp_path: Path, server: FaultyServer) -> Iterator[Callable[..., AdapterFetcher]]:
    """Makes fetchers that ask `server`, with a cache in the test's directory."""
    with ExitStack() as stack:

        def make(**options) -> AdapterFetcher:
            settings = {
                "adapter_hub_endpoint": server.url,
                "adapter_backoff_seconds": 0.01,
                "adapter_stall_seconds": 5.0,
                "adapter_fetch_seconds": 20.0,
            }
            fetcher = AdapterFetcher(SourceSettings(**(settings | options)), tmp_path / "cache")
            stack.callback(fetcher.close)
            return fetcher

        yield make
        # Nobody waits for an answer that a test has held up.
        server.clear_faults()
