"""A real HTTP server in a thread, around any WSGI application, which fails as it is told."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from werkzeug.serving import WSGIRequestHandler, make_server


@dataclass
class Fault:
    """What happens to the next `times` requests whose path holds `path`."""

    path: str
    times: int = 1
    method: str = "GET"
    status: int | None = None
    """Answer with this and an empty body."""
    cut_at: int | None = None
    """Send so many bytes of the body, and hang up."""
    hold_at: int | None = None
    """Send so many bytes of the body, and go on when `gate` opens."""
    gate: threading.Event = field(default_factory=threading.Event)
    pace: float = 0.0
    """Send 1000 bytes at a time, with so many seconds before each, until `gate` opens."""
    replace: Callable[[bytes], bytes] | None = None
    """Send another body."""
    seen: threading.Event = field(default_factory=threading.Event)
    """Set when a request has met the fault, and has been sent what is sent before it."""


@dataclass
class SeenRequest:
    method: str
    path: str
    host: str
    authorization: str | None
    range: str | None


class FaultyServer:
    """Serves the application at `url` until it is left."""

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self._application = application
        self._lock = threading.Lock()
        self.faults: list[Fault] = []
        self.requests: list[SeenRequest] = []
        self._server = make_server(
            "127.0.0.1", 0, self._serve, threaded=True, request_handler=_Handler
        )
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def __enter__(self) -> FaultyServer:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.clear_faults()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def add_fault(self, path: str, **options: Any) -> Fault:
        fault = Fault(path, **options)
        self.faults.append(fault)
        return fault

    def clear_faults(self) -> None:
        """Let everything pass, also what is held up."""
        faults, self.faults = self.faults, []
        for fault in faults:
            fault.gate.set()

    def count(self, path: str, method: str = "GET") -> int:
        """Requests so far whose path holds this."""
        return len(self.seen(path, method))

    def seen(self, path: str, method: str = "GET") -> list[SeenRequest]:
        with self._lock:
            return [r for r in self.requests if path in r.path and r.method == method]

    def _serve(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        with self._lock:
            self.requests.append(
                SeenRequest(
                    method,
                    path,
                    environ["HTTP_HOST"],
                    environ.get("HTTP_AUTHORIZATION"),
                    environ.get("HTTP_RANGE"),
                )
            )
            fault = self._next_fault(method, path)
        if fault is None:
            return self._application(environ, start_response)
        if fault.status is not None:
            fault.seen.set()
            start_response(f"{fault.status} Fault", [("Content-Length", "0")])
            return []
        answer: dict[str, Any] = {}

        def catch(status: str, headers: list[tuple[str, str]], *_: Any) -> None:
            answer.update(status=status, headers=headers)

        body = b"".join(self._application(environ, catch))
        headers = answer["headers"]
        if fault.replace is not None:
            body = fault.replace(body)
            headers = [(k, v) for k, v in headers if k.lower() != "content-length"]
            headers.append(("Content-Length", str(len(body))))
        start_response(answer["status"], headers)
        return _send(body, fault)

    def _next_fault(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and fault.path in path and fault.method == method:
                fault.times -= 1
                return fault
        return None


def _send(body: bytes, fault: Fault) -> Iterator[bytes]:
    if fault.cut_at is not None:
        yield body[: fault.cut_at]
        fault.seen.set()
        return
    if fault.hold_at is not None:
        # An empty piece would not even send the headers.
        if fault.hold_at > 0:
            yield body[: fault.hold_at]
        fault.seen.set()
        fault.gate.wait(20)
        body = body[fault.hold_at :]
    fault.seen.set()
    if fault.pace:
        while body and not fault.gate.wait(fault.pace):
            yield body[:1000]
            body = body[1000:]
    yield body


class _Handler(WSGIRequestHandler):
    """Keeps its log to itself, and does not mind clients that hang up."""

    def log(self, *_: Any) -> None:
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:
            self.close_connection = True
