"""Starts the engine again when it dies.

The server's registry names the adapters: a new engine reads what is asked for, and what the server
was started to preload.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from prometheus_client import Counter

from loraplex.engine.async_engine import AsyncEngine
from loraplex.engine.core_client import EngineDeadError

logger = logging.getLogger(__name__)

# Seconds before a start; twice as many each time, as long as starts fail or engines die young.
FIRST_WAIT = 0.5
LONGEST_WAIT = 30.0
# An engine that has lived for so many seconds was in order.
OLD_AGE = 60.0
# So many starts may fail in a row: then whoever runs the server should know.
MOST_FAILURES = 3


class Supervisor:
    """Watches one engine, which was started."""

    def __init__(
        self, engine: AsyncEngine, restarts: Counter, prepare: Callable[[], Awaitable[None]]
    ) -> None:
        """prepare: what a new engine is to do before it serves, as far as it can."""
        self._engine = engine
        self._prepare = prepare
        self._restarts = restarts

    async def run(self) -> None:
        """Until it is cancelled. Raises EngineDeadError when the engine can't be started again."""
        wait = 0.0
        while True:
            born = time.monotonic()
            await self._engine.wait_until_dead()
            if time.monotonic() - born > OLD_AGE:
                wait = 0.0
            wait = await self._restart(wait)
            self._restarts.inc()
            logger.info("The engine is back.")

    async def _restart(self, wait: float) -> float:
        """Returns the seconds to wait before the next time."""
        for _ in range(MOST_FAILURES):
            logger.warning("Starting the engine again in %g seconds.", wait)
            await asyncio.sleep(wait)
            wait = min(max(FIRST_WAIT, 2 * wait), LONGEST_WAIT)
            try:
                await self._engine.start()
                await self._try_to_prepare()
                return wait
            except (EngineDeadError, ValueError) as error:
                logger.error("%s", error)
        raise EngineDeadError(f"the engine could not be started again, {MOST_FAILURES} times")

    async def _try_to_prepare(self) -> None:
        try:
            await self._prepare()
        except ValueError as error:
            logger.error("The engine goes on without what was to be preloaded: %s", error)
