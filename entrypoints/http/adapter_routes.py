"""The routes that change which adapters are served, and where they are kept."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from fastapi.routing import APIRoute

from loraplex.engine.core_client import EngineDeadError
from loraplex.engine.lora_request import LoRARequest
from loraplex.entrypoints.http.access_log import may_see
from loraplex.entrypoints.http.adapter_places import AdapterPlaces
from loraplex.entrypoints.http.errors import ApiError
from loraplex.entrypoints.http.model_registry import adapter_request
from loraplex.entrypoints.http.serving import Serving
from loraplex.entrypoints.http.streaming import json_response
from loraplex.entrypoints.http.strict_model import StrictModel
from loraplex.lora.sources.reference import parse_adapter_reference

router = APIRouter()

Tier = Literal["host", "pool"]


class AdapterName(StrictModel):
    """Body of POST /v1/refresh_lora_adapter and /v1/unpin_lora_adapter."""

    lora_name: str


class LoadAdapterRequest(AdapterName):
    """Body of POST /v1/load_lora_adapter."""

    lora_path: str
    load_inplace: bool = False
    preload: Tier | None = None
    pin: bool = False


class PreloadAdapterRequest(AdapterName):
    """Body of POST /v1/preload_lora_adapter."""

    tier: Tier = "pool"
    pin: bool = False


class UnloadAdapterRequest(AdapterName):
    """Body of POST /v1/unload_lora_adapter."""

    abort: bool = False
    delete_files: bool = False


@router.post("/v1/load_lora_adapter")
async def load_adapter(body: LoadAdapterRequest, request: Request) -> Response:
    """Serve an adapter from now on. It is fetched and read when it is first used, or before it is
    served, with preload or pin. load_inplace: another one of this name is replaced; requests that
    run finish with that."""
    serving: Serving = request.app.state.serving
    reference = _places(request).parse(body.lora_path)
    adapter = adapter_request(body.lora_name, reference)
    if not body.load_inplace:
        serving.models.check_free(body.lora_name)
    if body.preload or body.pin:
        await serving.engine.preload_adapter(adapter, body.preload or "pool", body.pin)
    if not body.load_inplace:
        serving.models.add(adapter)
    else:
        old = serving.models.replace(adapter)
        if old == adapter:
            await serving.engine.refresh_adapter(adapter)
        elif old is not None:
            await _unload(serving, old)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter")
async def unload_adapter(body: UnloadAdapterRequest, request: Request) -> Response:
    """Serve an adapter no more, and free all that it takes when the last request that runs with it
    ends. abort: end those now. delete_files: also remove what was downloaded."""
    _places(request)
    serving: Serving = request.app.state.serving
    adapter = serving.models.remove(body.lora_name)
    await _unload(serving, adapter, abort=body.abort, delete_files=body.delete_files)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


@router.post("/v1/preload_lora_adapter")
async def preload_adapter(body: PreloadAdapterRequest, request: Request) -> Response:
    """Bring an adapter into host memory or into the pool. pin: it stays there."""
    serving, adapter = _adapter(body, request)
    return json_response(await serving.engine.preload_adapter(adapter, body.tier, body.pin))


@router.post("/v1/unpin_lora_adapter")
async def unpin_adapter(body: AdapterName, request: Request) -> Response:
    """Let an adapter be evicted again."""
    serving, adapter = _adapter(body, request)
    return json_response(await serving.engine.unpin_adapter(adapter))


@router.post("/v1/refresh_lora_adapter")
async def refresh_adapter(body: AdapterName, request: Request) -> Response:
    """Serve new requests with the version that the adapter's source has now."""
    serving, adapter = _adapter(body, request)
    return json_response(await serving.engine.refresh_adapter(adapter))


ADMIN_PATHS = frozenset(route.path for route in router.routes if isinstance(route, APIRoute))


@router.get("/v1/lora_adapters")
async def list_adapters(request: Request) -> Response:
    """The adapters that are served, and where they are."""
    serving: Serving = request.app.state.serving
    states: dict[str, dict[str, Any]] = {}
    for state in await serving.engine.adapters():
        states |= dict.fromkeys(state["references"], state)
    adapters = []
    for adapter in filter(lambda a: may_see(a.lora_name), serving.models.adapters()):
        state = states.get(str(parse_adapter_reference(adapter.lora_path)), {})
        names = {"lora_name": adapter.lora_name, "lora_path": adapter.lora_path}
        adapters.append({**state, **names})
    return json_response({"object": "list", "data": adapters})


async def _unload(serving: Serving, adapter: LoRARequest, **options: bool) -> None:
    """Of the engine, if no other name means the same."""
    if not serving.models.serves(adapter.lora_path):
        # An engine that is dead has nothing loaded when it is back.
        with suppress(EngineDeadError):
            await serving.engine.unload_adapter(adapter, **options)


def _adapter(body: AdapterName, request: Request) -> tuple[Serving, LoRARequest]:
    """A registered adapter that a client may change. Raises ApiError 403 and 404."""
    _places(request)
    serving: Serving = request.app.state.serving
    return serving, serving.models.adapter(body.lora_name)


def _places(request: Request) -> AdapterPlaces:
    """Where adapters may be loaded from while the server runs. Raises ApiError 403 if nowhere."""
    serving: Serving = request.app.state.serving
    places = serving.models.places
    if not places:
        raise ApiError(403, "adapters can't be changed: start the server with --allow-runtime-lora")
    return places
