"""What every request passes through: who calls, how often, and how large and slow a body."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from contextlib import nullcontext

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraplex.entrypoints.http.access_log import Visit, current_visit, log_access
from loraplex.entrypoints.http.api_keys import Caller, KeyRing
from loraplex.entrypoints.http.errors import ApiError
from loraplex.entrypoints.http.tracing import Tracer

# Whoever watches the server needs no key.
OPEN_PATHS = frozenset({"/", "/health", "/live", "/ping", "/ready", "/metrics", "/version"})
# Seconds in which the next piece of a body must come.
BODY_WAIT = 30.0


class Gate:
    """An ASGI middleware."""

    def __init__(
        self,
        app: ASGIApp,
        keys: KeyRing | None,
        admin_paths: Collection[str],
        max_request_bytes: int,
        error_response: Callable[[str, Exception], Response],
        tracer: Tracer | None,
    ) -> None:
        """keys: None lets everybody through. error_response: the answer at a path to an error."""
        self._app = app
        self._keys = keys
        self._admin_paths = admin_paths
        self._max_request_bytes = max_request_bytes
        self._error_response = error_response
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        visit = Visit(scope, headers, send)
        tracer = self._tracer
        span = None if tracer is None else tracer.start(scope["method"], scope["path"], headers)
        try:
            visit.caller = self._authenticate(scope, headers)
            self._check_length(headers)
            current_visit.set(visit)
            with visit.caller.admitted() if visit.caller else nullcontext():
                await self._app(scope, self._limited(receive), visit.send)
        except Exception as error:
            if visit.has_begun:
                raise
            response = self._error_response(scope["path"], error)
            if isinstance(error, ApiError) and error.status == 401:
                response.headers["WWW-Authenticate"] = "Bearer"
            await response(scope, receive, visit.send)
        finally:
            entry = visit.entry()
            log_access(entry)
            if tracer is not None and span is not None:
                tracer.end(span, entry, visit.times)

    def _authenticate(self, scope: Scope, headers: dict[bytes, bytes]) -> Caller | None:
        """Whose request this is; None where everybody may. Raises ApiError 401, 403."""
        path = scope["path"]
        if self._keys is None or (path in OPEN_PATHS and scope["method"] in ("GET", "HEAD")):
            return None
        kind, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        caller = self._keys.find(key.strip()) if kind.lower() == "bearer" else None
        if caller is None:
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
        if path in self._admin_paths and not caller.key.admin:
            raise ApiError(403, f"this API key is not for {path}", code="admin_only")
        return caller

    def _check_length(self, headers: dict[bytes, bytes]) -> None:
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._max_request_bytes:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"the body is too large: this server takes {self._max_request_bytes} bytes"
        )

    def _limited(self, receive: Receive) -> Receive:
        """`receive`, as long as the body is neither too large nor too slow."""
        num_bytes, is_whole = 0, False

        async def limited() -> Message:
            nonlocal num_bytes, is_whole
            if is_whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), BODY_WAIT)
            except TimeoutError:
                raise HTTPException(408, f"no more of the body came in {BODY_WAIT:g} s") from None
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_request_bytes:
                raise HTTPException(413, self._too_large().message)
            is_whole = not message.get("more_body", False)
            return message

        return limited
