"""The HTTP application: routes, who may call them, and how errors look."""

from __future__ import annotations

import hmac
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

import loraplex
from loraplex.engine.core_client import EngineDeadError
from loraplex.entrypoints import (
    lorax_routes,
    openai_chat,
    openai_completions,
    operator_routes,
)
from loraplex.entrypoints.errors import ApiError, IncompleteGeneration, to_lorax_error
from loraplex.entrypoints.serving import Serving
from loraplex.entrypoints.streaming import json_error


def build_app(
    serving: Serving, api_key: str | None = None, runtime_lora_directory: Path | None = None
) -> FastAPI:
    """The application over a started engine.

    With an api_key, /v1 routes want it as a bearer token. Adapters may be added and removed while
    the server runs if there is a directory that they may come from.
    """
    app = FastAPI(title="Loraplex", version=loraplex.__version__)
    app.state.serving = serving
    app.state.runtime_lora_directory = runtime_lora_directory
    for module in (openai_completions, openai_chat, lorax_routes, operator_routes):
        app.include_router(module.router)
    # Each by name: what only Exception's handler knows is logged as a crash.
    for kind in (ApiError, EngineDeadError, IncompleteGeneration, ValueError, HTTPException,
                 RequestValidationError, Exception):  # fmt: skip
        app.add_exception_handler(kind, _answer_error)
    if api_key is not None:
        app.add_middleware(BearerAuthentication, api_key=api_key)
    return app


async def _answer_error(request: Request, error: Exception) -> Response:
    return error_response(request.url.path, error)


def error_response(path: str, error: Exception) -> Response:
    """The error in the shape that clients of this path expect."""
    return json_error(to_lorax_error(error) if path in lorax_routes.PATHS else error)


class BearerAuthentication:
    """Lets nobody without the key through to /v1."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._expected = f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1"):
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                error = ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
                response = json_error(error)
                response.headers["WWW-Authenticate"] = "Bearer"
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)
