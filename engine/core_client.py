"""The front's end of the engine process: starts it, speaks with it, notices its death.

Knows messages and processes; requests and users are async_engine's.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import shutil
import subprocess
import tempfile
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from loraplex.engine.child_process import start_child
from loraplex.engine.config import EngineConfig
from loraplex.engine.core_process import (
    MOST_STEPS_BEHIND,
    AbortRequests,
    AddRequest,
    Call,
    CallResult,
    CoreFailed,
    CoreProcessArguments,
    InputMessage,
    OutputMessage,
    Outputs,
    Ready,
    Shutdown,
    run_engine_process,
)
from loraplex.engine.errors import RequestError
from loraplex.engine.lora_request import LoRARequest
from loraplex.engine.messages import EngineOutput, EngineRequest, ModelInfo

logger = logging.getLogger(__name__)

# How long, in seconds, what a process wrote before it ended may take to arrive.
LAST_WORDS_WAIT = 0.1


class EngineDeadError(RuntimeError):
    """The engine process is gone: nothing can be asked of it any more."""


class CoreClient:
    """One engine process. All methods belong to the event loop that runs `start`."""

    def __init__(self, config: EngineConfig, core_factory: str) -> None:
        self._socket_directory = tempfile.mkdtemp(prefix="loraplex-")
        self._arguments = CoreProcessArguments(
            core_factory=core_factory,
            config=config,
            socket_directory=self._socket_directory,
            log_level=logging.getLogger().getEffectiveLevel(),
        )
        self._context = zmq.Context(io_threads=1)
        self._inputs = self._context.socket(zmq.PUSH)
        self._inputs.set_hwm(0)  # The front never waits for the core to take a message.
        self._inputs.bind(self._arguments.input_address)
        self._outputs = zmq.asyncio.Socket(self._context, zmq.PULL)
        self._outputs.set_hwm(MOST_STEPS_BEHIND)
        self._outputs.bind(self._arguments.output_address)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(OutputMessage)
        self._call_ids = itertools.count()
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> ModelInfo:
        """Start the process and wait until its core is ready, however long the model loads.

        Raises ValueError for a setting that the core refuses, EngineDeadError if it broke.
        """
        loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self._silent: asyncio.Future[bytes] = loop.create_future()
        self._process, self._connection = start_child(run_engine_process)
        self._connection.send(self._arguments)
        loop.add_reader(self._connection, self._on_end)
        message = await self._receive_message()
        if isinstance(message, CoreFailed):
            if message.is_user_error:
                raise ValueError(message.message)
            raise EngineDeadError(f"the engine could not start: {message.message}")
        assert isinstance(message, Ready)
        return message.model_info

    def add_requests(self, requests: list[EngineRequest]) -> None:
        """Raises EngineDeadError, like all that sends."""
        for request in requests:
            self._send(AddRequest(request))

    def abort_requests(self, request_ids: list[str]) -> None:
        self._send(AbortRequests(request_ids))

    async def call(
        self, method: str, lora_request: LoRARequest | None = None, **options: Any
    ) -> Any:
        """The result of one of core_process.CALLABLE_METHODS. Raises RequestError for what can't be
        done."""
        call_id = next(self._call_ids)
        result = self._calls[call_id] = asyncio.get_running_loop().create_future()
        try:
            self._send(Call(call_id, method, lora_request, options))
            return await result
        finally:
            del self._calls[call_id]

    async def receive_outputs(self) -> list[EngineOutput]:
        """Wait for what a step gave; one task calls this, and calls' results arrive on the way.

        Raises EngineDeadError when nothing will come any more; pending calls then fail with it.
        """
        try:
            while True:
                message = await self._receive_message()
                if isinstance(message, Outputs):
                    return message.outputs
                if isinstance(message, CoreFailed):
                    raise EngineDeadError(f"the engine failed: {message.message}")
                assert isinstance(message, CallResult)
                self._finish_call(message)
        except EngineDeadError as error:
            for result in self._calls.values():
                if not result.done():
                    result.set_exception(error)
            raise

    async def shutdown(self, patience: float) -> None:
        """End the process and remove what it leaves; after `patience` seconds it is killed."""
        try:
            if self._process is not None:
                await self._end_process(self._process, patience)
        finally:
            self._inputs.close(linger=0)
            self._outputs.close(linger=0)
            self._context.term()
            shutil.rmtree(self._socket_directory, ignore_errors=True)

    async def _end_process(self, process: subprocess.Popen[bytes], patience: float) -> None:
        try:
            if patience and not self._ended.is_set():
                self._send(Shutdown())
                await asyncio.wait_for(self._drain_until_end(), patience)
        except (EngineDeadError, TimeoutError):
            logger.warning("The engine process did not end when asked to; killing it.")
        finally:
            process.kill()
            process.wait()
            asyncio.get_running_loop().remove_reader(self._connection)
            self._silent.cancel()
            self._connection.close()

    async def _drain_until_end(self) -> None:
        """A core that waits for its outputs to be taken would not see that it is to end."""

        async def drain() -> None:
            while True:
                await self._outputs.recv()

        draining = asyncio.create_task(drain())
        try:
            await self._ended.wait()
        finally:
            draining.cancel()
            await asyncio.gather(draining, return_exceptions=True)

    def _send(self, message: InputMessage) -> None:
        try:
            self._inputs.send(self._encoder.encode(message), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            raise EngineDeadError("the engine process is gone") from error

    async def _receive_message(self) -> OutputMessage:
        frame = asyncio.ensure_future(self._outputs.recv())
        try:
            if not frame.done():
                await asyncio.wait({frame, self._silent}, return_when=asyncio.FIRST_COMPLETED)
            if frame.done():
                return self._decoder.decode(frame.result())
            raise EngineDeadError(f"the engine process ended with {self._describe_exit()}")
        finally:
            if not frame.done():
                frame.cancel()

    def _describe_exit(self) -> str:
        assert self._process is not None
        code = self._process.wait()
        return f"signal {-code}" if code < 0 else f"exit status {code}"

    def _finish_call(self, message: CallResult) -> None:
        result = self._calls.get(message.call_id)
        if result is None or result.done():
            return
        if message.error is None:
            result.set_result(message.value)
        elif message.error_status is not None:
            result.set_exception(RequestError(message.error, message.error_status))
        else:
            result.set_exception(RuntimeError(message.error))

    def _on_end(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._connection)
        self._ended.set()
        loop.call_later(LAST_WORDS_WAIT, self._on_silence)

    def _on_silence(self) -> None:
        if not self._silent.done():
            self._silent.set_result(b"")
