"""The engine process: a busy loop around an EngineCore, and the messages it speaks.

Knows neither text nor HTTP nor which core it runs: a core is named by the import path of its
factory, so that a spawned process can make it. The other end is core_client.
"""

from __future__ import annotations

import gc
import logging
import os
import pkgutil
import shutil
import threading
import traceback
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

import msgspec
import zmq

from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import RequestError
from loraplex.engine.lora_request import LoRARequest
from loraplex.engine.messages import EngineOutput, EngineRequest, ModelInfo, refusal

if TYPE_CHECKING:
    from loraplex.engine.core import EngineCore

logger = logging.getLogger(__name__)

# A load wakes the core by itself; this bounds how long a message waits meanwhile, in seconds.
LOAD_WAIT = 0.002
# So many steps' outputs may be on their way; they would only wait, and take memory.
MOST_STEPS_BEHIND = 8
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class AddRequest(msgspec.Struct, tag="add"):
    request: EngineRequest


class AbortRequests(msgspec.Struct, tag="abort"):
    request_ids: list[str]


class Call(msgspec.Struct, tag="call"):
    """Asks for the result of one of CALLABLE_METHODS."""

    call_id: int
    method: str
    lora_request: LoRARequest | None = None
    """The method's first argument, if it takes one."""
    options: dict[str, Any] = {}


class Shutdown(msgspec.Struct, tag="shutdown"):
    pass


class Ready(msgspec.Struct, tag="ready"):
    """The first message of a core that started."""

    model_info: ModelInfo


class Outputs(msgspec.Struct, tag="outputs"):
    outputs: list[EngineOutput]


class CallResult(msgspec.Struct, tag="result"):
    call_id: int
    value: Any = None
    error: str | None = None
    error_status: int | None = None
    """None: the core broke; else the HTTP status that fits what was asked for."""


class CoreFailed(msgspec.Struct, tag="failed"):
    """The last message of a core that broke, at its start or in a step."""

    message: str
    is_user_error: bool
    """A setting that is not allowed, rather than a failure of ours."""


InputMessage = AddRequest | AbortRequests | Call | Shutdown
OutputMessage = Ready | Outputs | CallResult | CoreFailed

CALLABLE_METHODS = (
    "stats", "check_integrity", "adapters", "locate_adapter", "preload_adapter", "unpin_adapter",
    "refresh_adapter", "unload_adapter",
)  # fmt: skip


@dataclass(frozen=True)
class CoreProcessArguments:
    """What the engine process is started with; picklable."""

    core_factory: str
    """`package.module:name` of a callable that makes a core of an EngineConfig."""
    config: EngineConfig
    socket_directory: str
    log_level: int

    @property
    def input_address(self) -> str:
        return f"ipc://{self.socket_directory}/input"

    @property
    def output_address(self) -> str:
        return f"ipc://{self.socket_directory}/output"


def run_engine_process(parent: Connection) -> None:
    """The main function of the engine process: make the core, then serve it to the end.

    parent: it sends CoreProcessArguments and then nothing.
    The process ends with the parent's Shutdown message, the parent's death or the core's failure.
    """
    arguments: CoreProcessArguments = parent.recv()
    logging.basicConfig(level=arguments.log_level, format=LOG_FORMAT)
    _die_with_parent(parent, arguments.socket_directory)
    context = zmq.Context(io_threads=1)
    inputs = context.socket(zmq.PULL)
    inputs.connect(arguments.input_address)
    outputs = context.socket(zmq.PUSH)
    outputs.set_hwm(MOST_STEPS_BEHIND)
    outputs.connect(arguments.output_address)
    channel = CoreChannel(inputs, outputs)
    try:
        core = _make_core(arguments)
        # Or a collection now and then goes through all modules, and a step takes 100 ms more.
        gc.collect()
        gc.freeze()
        try:
            channel.send(Ready(core.model_info))
            serve_core(core, channel)
        finally:
            core.shutdown()
    except SettingError as error:
        channel.send(CoreFailed(str(error), is_user_error=True))
    except Exception as error:
        logger.error("The engine core failed.", exc_info=True)
        channel.send(CoreFailed(f"{type(error).__name__}: {error}", is_user_error=False))
    finally:
        # A second is enough for a living parent to read it all; a dead one must not hold us.
        context.destroy(linger=1000)


class SettingError(ValueError):
    """The core refuses to start with these settings."""


def _make_core(arguments: CoreProcessArguments) -> EngineCore:
    try:
        return pkgutil.resolve_name(arguments.core_factory)(arguments.config)
    except ValueError as error:
        raise SettingError(str(error)) from error


def _die_with_parent(parent: Connection, socket_directory: str) -> None:
    """End this process when the parent does, even from within a step or a load."""

    def watch() -> None:
        wait([parent])
        shutil.rmtree(socket_directory, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


class CoreChannel:
    """The two sockets of the engine process, speaking messages."""

    def __init__(self, inputs: zmq.Socket, outputs: zmq.Socket) -> None:
        self._inputs = inputs
        self._outputs = outputs
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(InputMessage)

    def send(self, message: OutputMessage) -> None:
        """Waits while the front is far behind: then there is no use in stepping."""
        self._outputs.send(self._encoder.encode(message))

    def receive(self, may_wait: bool) -> InputMessage | None:
        """The next message, or None if there is none and it must not wait for one."""
        try:
            return self._decoder.decode(self._inputs.recv(0 if may_wait else zmq.NOBLOCK))
        except zmq.Again:
            return None


def serve_core(core: EngineCore, channel: CoreChannel) -> None:
    """Take messages and step, until Shutdown. What step() raises ends the process."""
    while True:
        refused: list[EngineOutput] = []
        may_wait = not core.has_unfinished_requests()
        while (message := channel.receive(may_wait)) is not None:
            if isinstance(message, Shutdown):
                return
            if isinstance(message, AddRequest):
                refused += _add(core, message.request)
            elif isinstance(message, AbortRequests):
                core.abort_requests(message.request_ids)
            else:
                _call(core, message, channel)
            may_wait = False
        outputs = refused + core.step()
        if outputs:
            channel.send(Outputs(outputs))
        elif core.has_unfinished_requests():
            core.wait_for_work(LOAD_WAIT)


def _add(core: EngineCore, request: EngineRequest) -> list[EngineOutput]:
    """The refusal, if the core refuses the request."""
    try:
        core.add_request(request)
    except RequestError as error:
        return [refusal(request, error)]
    return []


def _call(core: EngineCore, call: Call, channel: CoreChannel) -> None:
    """Send the result, now or when a later step gives it."""

    def send(done: Future[Any]) -> None:
        error = done.exception()
        if error is None:
            result = CallResult(call.call_id, value=done.result())
        elif isinstance(error, ValueError):
            status = getattr(error, "status", 400)
            result = CallResult(call.call_id, error=str(error), error_status=status)
        else:
            text = "".join(traceback.format_exception(error))
            result = CallResult(call.call_id, error=text)
        channel.send(result)

    done: Future[Any] = Future()
    try:
        assert call.method in CALLABLE_METHODS, call.method
        arguments = () if call.lora_request is None else (call.lora_request,)
        value = getattr(core, call.method)(*arguments, **call.options)
        if isinstance(value, Future):
            done = value
        else:
            done.set_result(value)
    except Exception as error:
        done.set_exception(error)
    done.add_done_callback(send)
