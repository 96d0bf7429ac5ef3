"""The routes for whoever runs the server: models, health, metrics, version."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

import loraplex
from loraplex.engine.async_engine import AsyncEngine
from loraplex.engine.core_client import EngineDeadError
from loraplex.entrypoints.errors import ApiError
from loraplex.entrypoints.serving import Serving
from loraplex.entrypoints.streaming import json_response

router = APIRouter()

# How long, in seconds, a scrape waits for a core that is busy with a long step.
STATS_WAIT = 5.0


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """The base model and the adapters."""
    serving: Serving = request.app.state.serving
    return json_response({"object": "list", "data": serving.models.cards()})


@router.get("/v1/models/{name:path}")
async def show_model(name: str, request: Request) -> Response:
    """One of the models."""
    serving: Serving = request.app.state.serving
    return json_response(serving.models.card(name))


@router.get("/live")
async def check_life() -> Response:
    """200 while the server answers at all; it restarts its engine by itself."""
    return Response()


@router.get("/ready")
async def check_readiness(request: Request) -> Response:
    """200 while requests should be sent here: not while the engine is gone, or the server ends."""
    serving: Serving = request.app.state.serving
    if request.app.state.is_draining:
        raise ApiError(503, "this server is about to end", code="draining")
    await serving.engine.check_health()
    return Response()


@router.get("/")
@router.get("/ping")
@router.get("/health")
async def check_health(request: Request) -> Response:
    """200 while the engine can serve, 503 when it can't."""
    serving: Serving = request.app.state.serving
    await serving.engine.check_health()
    return Response()


@router.get("/metrics")
async def show_metrics(request: Request) -> Response:
    """For Prometheus. Without the core's numbers while it can't give them."""
    serving: Serving = request.app.state.serving
    text = serving.metrics.render(await _core_stats(serving.engine))
    return Response(text, media_type=CONTENT_TYPE_LATEST)


@router.get("/version")
async def show_version() -> Response:
    return json_response({"version": loraplex.__version__})


async def _core_stats(engine: AsyncEngine) -> dict | None:
    try:
        return await asyncio.wait_for(engine.stats(), STATS_WAIT)
    except (EngineDeadError, TimeoutError):
        return None
