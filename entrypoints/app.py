"""The HTTP application: routes, who may call them, and how errors look."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

import loraplex
from loraplex.engine.core_client import EngineDeadError
from loraplex.entrypoints.http import adapter_routes, admin_routes, operator_routes
from loraplex.entrypoints.http.api_keys import KeyRing
from loraplex.entrypoints.http.errors import ApiError, IncompleteGeneration, to_lorax_error
from loraplex.entrypoints.http.gate import Gate
from loraplex.entrypoints.http.server_config import ServerConfig
from loraplex.entrypoints.http.serving import Serving
from loraplex.entrypoints.http.streaming import json_error
from loraplex.entrypoints.http.tracing import Tracer
from loraplex.entrypoints.lorax import routes as lorax_routes
from loraplex.entrypoints.openai import chat, completions, embeddings, tokenize

PUBLIC = (
    completions,
    chat,
    embeddings,
    tokenize,
    lorax_routes,
    operator_routes,
)
# These may have a port of their own.
ADMIN = (admin_routes, adapter_routes, operator_routes)
EVERYTHING = (*PUBLIC, admin_routes, adapter_routes)


def build_app(
    serving: Serving,
    config: ServerConfig,
    keys: KeyRing | None,
    modules: Sequence[ModuleType] = EVERYTHING,
    tracer: Tracer | None = None,
) -> FastAPI:
    """An application over a started engine. keys: who may call; None: everybody. modules: whose
    routes it has."""
    app = FastAPI(title="Loraplex", version=loraplex.__version__)
    app.state.serving = serving
    app.state.is_draining = False
    for module in modules:
        app.include_router(module.router)
    # Each by name: Exception's handler would be for crashes, which are logged as such, too.
    for kind in (ApiError, EngineDeadError, IncompleteGeneration, ValueError, HTTPException,
                 RequestValidationError):  # fmt: skip
        app.add_exception_handler(kind, _answer_error)
    app.add_middleware(
        Gate,
        keys=keys,
        admin_paths=admin_routes.ADMIN_PATHS | adapter_routes.ADMIN_PATHS,
        max_request_bytes=config.max_request_bytes,
        error_response=error_response,
        tracer=tracer,
    )
    if config.cors_origins is not None:
        # Around the gate: a browser asks without the key whether it may ask.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    return app


async def _answer_error(request: Request, error: Exception) -> Response:
    return error_response(request.url.path, error)


def error_response(path: str, error: Exception) -> Response:
    """The error in the shape that clients of this path expect."""
    return json_error(to_lorax_error(error) if path in lorax_routes.PATHS else error)
