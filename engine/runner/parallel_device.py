"""A device of several processes: this one and workers, each with a share of the model and a pool.

Pages have the same ids in all of them, so that the core need not know: every step and every copy of
an adapter is told to the workers, in order, and done here as well.
"""

from __future__ import annotations

import pickle
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from loraplex.engine.child_process import start_child
from loraplex.engine.config import EngineConfig
from loraplex.engine.models.config import read_model_config
from loraplex.engine.models.locate import locate_model
from loraplex.engine.models.registry import outline_model
from loraplex.engine.models.shards import Shard, check_shardable, shard_config
from loraplex.engine.runner.base_linears import ModelLinears
from loraplex.engine.runner.device import TorchDevice
from loraplex.engine.runner.parallel_linears import ParallelLinears, Question
from loraplex.engine.runner.pooled_adapters import PooledAdapters
from loraplex.engine.step import PendingStep, StepBatch
from loraplex.lora.host_store import HostAdapterStore
from loraplex.lora.sources.fetcher import AdapterFetcher

# How long, in seconds, a worker may take to end by itself.
PATIENCE = 10.0
GONE = "a tensor-parallel worker is gone"


@dataclass(frozen=True, slots=True)
class Start:
    """The first message to a worker."""

    config: EngineConfig
    shard: Shard
    directory: Path


@dataclass(frozen=True, slots=True)
class Launch:
    batch: StepBatch


@dataclass(frozen=True, slots=True)
class Copy:
    """Of an adapter: its pages, uint8 [num_pages, page_bytes], to these of the pool."""

    pages: list[int]
    data: npt.NDArray[np.uint8]


class Workers:
    """The processes of all shares but the first."""

    def __init__(self, config: EngineConfig, directory: Path) -> None:
        count = config.tensor_parallel_size
        # Steps are sent by one thread, and questions by those that load adapters.
        self._sending, self._asking = Lock(), Lock()
        self._connections: list[Connection] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        threads = str(max(1, torch.get_num_threads() // count))
        for index in range(1, count):
            process, ours = start_child(serve, OMP_NUM_THREADS=threads)
            ours.send(Start(config, Shard(index, count), directory))
            self._processes.append(process)
            self._connections.append(ours)

    def await_start(self) -> None:
        """Raises what kept a worker from starting."""
        for connection in self._connections:
            try:
                error = connection.recv()
            except EOFError:
                error = RuntimeError(GONE)
            if error is not None:
                raise error

    def send(self, message: Launch) -> None:
        """To all. Raises RuntimeError if one is gone."""
        data = _dump(message)
        for connection in self._connections:
            self._send(connection, data)

    def send_copy(self, pages: list[int], pages_of: Callable[[int], torch.Tensor]) -> None:
        """To each the pages of its share."""
        for index, connection in enumerate(self._connections, start=1):
            self._send(connection, _dump(Copy(pages, pages_of(index).numpy())))

    def ask(self, questions: Sequence[Question]) -> list[Any]:
        """See Askable. Raises RuntimeError if one is gone, and what a worker raised."""
        with self._asking:
            for connection, question in zip(self._connections, questions, strict=True):
                self._send(connection, _dump(question))
            try:
                answers = [
                    pickle.loads(connection.recv_bytes()) for connection in self._connections
                ]
            except (EOFError, OSError) as error:
                raise RuntimeError(GONE) from error
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    def _send(self, connection: Connection, data: bytes) -> None:
        try:
            with self._sending:
                connection.send_bytes(data)
        except OSError as error:
            raise RuntimeError(GONE) from error

    def close(self, patience: float = PATIENCE) -> None:
        """A worker ends when nobody speaks to it any more; after so many seconds it is killed."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            try:
                process.wait(patience)
            except subprocess.TimeoutExpired:
                process.kill()


def _dump(message: object) -> bytes:
    return pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)


class ParallelRunner:
    """Launches each step here and in the workers."""

    def __init__(self, runner: Any, workers: Workers) -> None:
        self._runner = runner
        self._workers = workers

    def launch(self, batch: StepBatch) -> PendingStep:
        nobody: Any = None
        spans = [replace(span, request=nobody) for span in batch.prompt_logprobs]
        self._workers.send(Launch(replace(batch, requests=[], prompt_logprobs=spans)))
        try:
            return self._runner.launch(batch)
        except BaseException:
            # They may be waiting for a sum that this process does not come to.
            self._workers.close(patience=0.0)
            raise


class ParallelAdapters(PooledAdapters):
    """Copies each share of an adapter to the pool of its process."""

    def __init__(
        self,
        workers: Workers,
        fetcher: AdapterFetcher,
        store: HostAdapterStore,
        memory: torch.Tensor,
    ) -> None:
        super().__init__(fetcher, store, memory)
        self._workers = workers

    def copy_to_pages(
        self, version: bytes, pages: list[int], after_steps: bool, before_steps: bool
    ) -> Future[None]:
        self._workers.send_copy(pages, self._store.image(version).pages_of)
        return super().copy_to_pages(version, pages, after_steps, before_steps)


class ParallelDevice:
    """See loraplex.engine.core.Device."""

    def __init__(self, config: EngineConfig, wake: Callable[[], None]) -> None:
        count = config.tensor_parallel_size
        # Before processes start, so that what they would all refuse is refused once.
        hf_config = read_model_config(locate_model(config.model, config.revision))
        check_shardable(outline_model(hf_config), count)
        shard_config(hf_config, count)
        self._directory = tempfile.TemporaryDirectory(prefix="loraplex-")
        directory = Path(self._directory.name)
        self._workers = Workers(config, directory)
        try:
            shard = Shard(0, count)
            make_adapters = partial(ParallelAdapters, self._workers)
            join_linears = partial(ParallelLinears, self._workers)
            self._device = TorchDevice(config, wake, shard, directory, make_adapters, join_linears)
            self._workers.await_start()
        except BaseException:
            self._workers.close(patience=0.0)
            raise
        self.model_info = self._device.model_info
        self.num_pages = self._device.num_pages
        self.page_bytes = self._device.page_bytes
        self.steps_ahead = self._device.steps_ahead
        self.num_awaited_pages = self._device.num_awaited_pages
        self.runner = ParallelRunner(self._device.runner, self._workers)
        self.adapter_store = self._device.adapter_store

    def close(self) -> None:
        self._workers.close()
        self._device.close()
        self._directory.cleanup()


def serve(connection: Connection) -> None:
    """Be the worker at the other end: do what comes, until nobody speaks any more."""
    start = connection.recv()
    try:
        device = TorchDevice(start.config, lambda: None, start.shard, start.directory)
    except Exception as error:
        connection.send(error)
        return
    connection.send(None)
    # Questions take a while, and steps don't wait for them.
    with ThreadPoolExecutor(1, initializer=_use_device, initargs=(device.memory.device,)) as aside:
        while True:
            try:
                message = pickle.loads(connection.recv_bytes())
            except EOFError:
                return
            if isinstance(message, Launch):
                device.runner.launch(message.batch)
            elif isinstance(message, Question):
                aside.submit(_answer, connection, message, device.linears)
            else:
                pages = torch.tensor(message.pages, device=device.memory.device)
                data = torch.from_numpy(message.data).to(device.memory.device)
                device.memory.index_copy_(0, pages, data)


def _use_device(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _answer(connection: Connection, question: Question, linears: ModelLinears) -> None:
    try:
        answer: object = question.answer(linears)
    except Exception as error:
        answer = error
    with suppress(OSError):  # Nobody waits for it any more.
        connection.send_bytes(_dump(answer))
