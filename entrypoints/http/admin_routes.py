"""The routes that show the inside of the server."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from loraplex.engine.async_engine import AsyncEngine
from loraplex.engine.core_client import EngineDeadError
from loraplex.entrypoints.http.errors import ApiError
from loraplex.entrypoints.http.serving import Serving
from loraplex.entrypoints.http.streaming import json_response

router = APIRouter()

# How long, in seconds, a scrape waits for a core that is busy with a long step.
STATS_WAIT = 5.0


@router.get("/admin/pool")
async def show_pool(request: Request) -> Response:
    """Who has the pages: counts by state, and the adapters with their requests."""
    serving: Serving = request.app.state.serving
    core = await _ask_core(serving.engine)
    if core is None:
        raise ApiError(503, "the engine can't tell at the moment", code="engine_busy")
    stats, adapters = core
    return json_response({"stats": stats, "adapters": adapters})


@router.get("/metrics")
async def show_metrics(request: Request) -> Response:
    """For Prometheus, or as JSON where that is asked for, as of LoRAX. Without the core's numbers
    while it can't give them."""
    serving: Serving = request.app.state.serving
    core = await _ask_core(serving.engine)
    if "application/json" in request.headers.get("accept", ""):
        return json_response(serving.metrics.as_json(core))
    text = serving.metrics.render(core)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


ADMIN_PATHS = frozenset({"/admin/pool"})


async def _ask_core(
    engine: AsyncEngine,
) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """The core's stats and adapters; None while it can't give them."""
    try:
        async with asyncio.timeout(STATS_WAIT):
            return await engine.stats(), await engine.adapters()
    except (EngineDeadError, TimeoutError):
        return None
