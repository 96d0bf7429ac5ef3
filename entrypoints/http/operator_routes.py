"""The routes that tell what is served, and whether it is: models, health, version."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

import loraplex
from loraplex.entrypoints.http.access_log import may_see
from loraplex.entrypoints.http.errors import ApiError
from loraplex.entrypoints.http.serving import Serving
from loraplex.entrypoints.http.streaming import json_response

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """The base model and the adapters that the caller may use."""
    serving: Serving = request.app.state.serving
    cards = [c for c in serving.models.cards() if c["parent"] is None or may_see(c["id"])]
    return json_response({"object": "list", "data": cards})


@router.get("/v1/models/{name:path}")
async def show_model(name: str, request: Request) -> Response:
    """One of the models."""
    serving: Serving = request.app.state.serving
    card = serving.models.card(name)
    if card["parent"] is not None and not may_see(name):
        raise serving.models.not_found(name)
    return json_response(card)


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


@router.get("/version")
async def show_version() -> Response:
    return json_response({"version": loraplex.__version__})
