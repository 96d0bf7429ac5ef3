"""A server's life: listen, load, serve, drain, end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
import socket
from collections.abc import Iterator, Sequence
from functools import partial

import uvicorn
import uvloop
from fastapi import FastAPI

from loraplex.engine.async_engine import AsyncEngine
from loraplex.engine.lora_request import LoRARequest
from loraplex.entrypoints.app import ADMIN, EVERYTHING, PUBLIC, build_app
from loraplex.entrypoints.http.access_log import start_access_log
from loraplex.entrypoints.http.api_keys import make_key_ring
from loraplex.entrypoints.http.metrics import ServerMetrics
from loraplex.entrypoints.http.model_registry import ModelRegistry, adapter_request
from loraplex.entrypoints.http.server_config import ServerConfig
from loraplex.entrypoints.http.serving import Serving
from loraplex.entrypoints.http.streaming import unless
from loraplex.entrypoints.http.supervisor import Supervisor
from loraplex.entrypoints.http.tracing import Tracer, otlp_provider
from loraplex.lora.sources.reference import parse_adapter_reference

logger = logging.getLogger(__name__)

# Idle connections outlive the pauses of a client that reuses them.
KEEP_ALIVE = 75
# What answers that were just cut short may take to reach their clients, in seconds.
LAST_ANSWERS_WAIT = 5.0


def run_server(engine: AsyncEngine, config: ServerConfig) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises ValueError for settings that are not allowed, EngineDeadError if the engine can't start.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(engine, config))


async def _serve(engine: AsyncEngine, config: ServerConfig) -> None:
    # What can be wrong here is told before a model is loaded for minutes.
    adapters = adapters_of(config)
    keys = make_key_ring(config)
    if config.access_log:
        start_access_log()
    provider = None if config.otlp_endpoint is None else otlp_provider(config.otlp_endpoint)
    tracer = None if provider is None else Tracer(provider)
    _allow_many_connections()
    with contextlib.ExitStack() as stack:
        listeners = [
            stack.enter_context(contextlib.closing(_bind(host, port, config.client_timeout)))
            for host, port in _addresses(config)
        ]
        signals = stack.enter_context(_signals())
        try:
            await unless(signals.first.wait(), engine.start())
            if signals.first.is_set():
                return
            serving = make_serving(engine, config, adapters)
            prepare = partial(_preload_adapters, engine, serving.models, config)
            await prepare()
            supervisor = Supervisor(engine, serving.metrics.engine_restarts, prepare)
            has_two = config.admin_port is not None
            apps = [
                build_app(serving, config, keys, modules, tracer)
                for modules in ((PUBLIC, ADMIN) if has_two else (EVERYTHING,))
            ]
            servers = [
                RunningServer(app, listener) for app, listener in zip(apps, listeners, strict=True)
            ]
            await _run(servers, engine, supervisor, signals, config.shutdown_grace)
        finally:
            await engine.shutdown()
            if provider is not None:
                await asyncio.to_thread(provider.shutdown)


def adapters_of(config: ServerConfig) -> list[LoRARequest]:
    """Those that are served from the start. Raises ValueError for a reference that is none."""
    return [_parse_module(name, path) for name, path in config.adapter_paths()]


def make_serving(
    engine: AsyncEngine, config: ServerConfig, adapters: Sequence[LoRARequest]
) -> Serving:
    """What the routes need, over a started engine."""
    names = config.served_model_name or [engine.model_info.model_name]
    models = ModelRegistry(
        names,
        engine.config.model,
        engine.model_info.max_model_len,
        adapters,
        config.allow_runtime_lora or (),
    )
    return Serving(
        engine,
        models,
        ServerMetrics(),
        config.limits,
        config.tool_call_parser,
        config.reasoning_parser,
        config.trust_request_chat_template,
    )


def _parse_module(name: str, path: str) -> LoRARequest:
    """One of --lora-modules. Raises ValueError."""
    reference = parse_adapter_reference(path)
    if reference.source == "hub" and not path.lower().startswith("hub:"):
        logger.warning("There is no directory %r: adapter %r is %s.", path, name, reference)
    return adapter_request(name, reference)


async def _preload_adapters(
    engine: AsyncEngine, models: ModelRegistry, config: ServerConfig
) -> None:
    """Those that are still served. Raises RequestError if one can't be had."""
    served = {adapter.lora_name: adapter for adapter in models.adapters()}
    wanted = [(name, False) for name in config.preload_lora_modules or ()]
    wanted += [(name, True) for name in config.pin_lora_modules or ()]
    await asyncio.gather(
        *(
            engine.preload_adapter(served[name], pin=is_pinned)
            for name, is_pinned in wanted
            if name in served
        )
    )


def _addresses(config: ServerConfig) -> list[tuple[str, int]]:
    """Where to listen: for clients, and for administrators if they have a port of their own."""
    addresses = [(config.host, config.port)]
    if config.admin_port is not None:
        addresses.append((config.admin_host, config.admin_port))
    return addresses


async def _run(
    servers: list[RunningServer],
    engine: AsyncEngine,
    supervisor: Supervisor,
    signals: Signals,
    grace: float,
) -> None:
    """Answer until the first signal, then finish what runs, for `grace` seconds or until the
    second signal. The first server is the clients'; the others answer to the end.

    Raises EngineDeadError if the engine dies for good.
    """
    supervising = asyncio.create_task(supervisor.run())
    await unless(signals.first.wait(), asyncio.wait({supervising}))
    for server in servers:
        server.app.state.is_draining = True
    servers[0].should_exit = True
    second = asyncio.ensure_future(signals.second.wait())
    await asyncio.wait(
        {servers[0].task, second}, timeout=grace, return_when=asyncio.FIRST_COMPLETED
    )
    second.cancel()
    supervising.cancel()
    await asyncio.wait({supervising})
    # Requests that still run fail now, and their clients get to see it.
    await engine.shutdown()
    for server in servers:
        server.should_exit = True
    await asyncio.wait({server.task for server in servers}, timeout=LAST_ANSWERS_WAIT)
    for server in servers:
        server.force_exit = True
        await server.task
    if not supervising.cancelled():
        supervising.result()


class RunningServer(uvicorn.Server):
    """uvicorn's server, as a task of its own. It leaves the signals to us: it would end the
    process with them."""

    def __init__(self, app: FastAPI, listener: socket.socket) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            http="httptools",
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE,
        )
        super().__init__(config)
        self.app = app
        self.task = asyncio.create_task(self.serve(sockets=[listener]))
        host, port = listener.getsockname()[:2]
        logger.info("Serving on http://%s:%d", f"[{host}]" if ":" in host else host, port)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Signals:
    """Which of SIGINT and SIGTERM came: the first asks for an end, the second to hurry."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()

    def take(self) -> None:
        (self.second if self.first.is_set() else self.first).set()


@contextlib.contextmanager
def _signals() -> Iterator[Signals]:
    loop = asyncio.get_running_loop()
    signals = Signals()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, signals.take)
    try:
        yield signals
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def _allow_many_connections() -> None:
    """As many open files as this process may have; the default is made for other programs."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _bind(host: str, port: int, client_timeout: float) -> socket.socket:
    """A socket that does not listen yet: until the model is loaded, connections are refused.

    Connections whose client takes nothing for client_timeout seconds are dropped by the kernel.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    milliseconds = round(1000 * client_timeout)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ValueError(
            f"host={host!r} with port={port} is not allowed: {error.strerror}"
        ) from error
    return listener
