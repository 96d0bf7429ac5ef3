"""The engine core: requests go in, tokens come out. `step` is the diagram of the whole engine.

Knows no text, no HTTP and no device: it drives the host half and hands each step's arrays to a
runner.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import islice
from typing import Any, Protocol

from loraplex.engine.adapters.lifecycle import AdapterLifecycle
from loraplex.engine.adapters.manager import AdapterManager
from loraplex.engine.adapters.resolver import AdapterResolver
from loraplex.engine.adapters.store import AdapterStore, Tier
from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import RequestError
from loraplex.engine.lora_request import LoRARequest
from loraplex.engine.memory.eviction import POLICIES, EvictionPolicy
from loraplex.engine.memory.kv_manager import KVManager
from loraplex.engine.memory.page_pool import PagePool, PageState
from loraplex.engine.messages import EngineOutput, EngineRequest, ModelInfo
from loraplex.engine.request import Request
from loraplex.engine.runner.input_batch import InputBatch
from loraplex.engine.scheduling.fitting import Fitting
from loraplex.engine.scheduling.isolation import Isolation
from loraplex.engine.scheduling.scheduler import Scheduler
from loraplex.engine.step import PendingStep, StepBatch, StepPlan, StepResult
from loraplex.engine.structured_outputs.grammar import GrammarCompiler

logger = logging.getLogger(__name__)

# What a lent page costs to bring back, relative to one copied in from host memory. Computing 16
# tokens again takes eight times as long as copying as many bytes with Llama-3-8B on an H100, and
# some hundred times on CPUs; but a load has fixed costs, too. Between 2 and 8 throughput is the
# same (docs/performance.md), and the lower it is the less adapters are loaded.
ADAPTER_RESTORE_COST = 1.0
KV_RESTORE_COST = 4.0

STATE_NAMES = {
    PageState.FREE: "pages_free",
    PageState.KV: "pages_kv",
    PageState.KV_CACHED: "pages_kv_cached",
    PageState.ADAPTER: "pages_adapter",
    PageState.ADAPTER_IDLE: "pages_adapter_idle",
}


class Runner(Protocol):
    def launch(self, batch: StepBatch) -> PendingStep:
        """Enqueue a step; what it reads and writes is ordered behind the steps launched before."""


class Device(Protocol):
    """What the core needs of the device half."""

    model_info: ModelInfo
    num_pages: int
    page_bytes: int
    steps_ahead: int
    """Steps that may be launched before the tokens of an earlier one are known: 0 or 1."""
    num_awaited_pages: int
    """Pages of adapters whose copies a step may wait for; none if it would be the host's wait."""

    @property
    def runner(self) -> Runner: ...

    @property
    def adapter_store(self) -> AdapterStore: ...

    def close(self) -> None:
        """Give back threads and memory."""


DeviceBuilder = Callable[[EngineConfig, Callable[[], None]], Device]
PoolMaker = Callable[[int, EvictionPolicy], PagePool]


def build_device(config: EngineConfig, wake: Callable[[], None]) -> Device:
    """The real device half; imported late, since it brings torch and the model."""
    from loraplex.engine.runner.device import TorchDevice
    from loraplex.engine.runner.parallel_device import ParallelDevice

    if config.tensor_parallel_size == 1:
        return TorchDevice(config, wake)
    return ParallelDevice(config, wake)


class EngineCore:
    """Schedules, launches and updates, step by step. One thread calls it."""

    def __init__(
        self,
        config: EngineConfig,
        build: DeviceBuilder = build_device,
        make_pool: PoolMaker = PagePool,
    ) -> None:
        self._wake = threading.Event()
        self._device = build(config, self._wake.set)
        self.model_info = self._device.model_info
        num_blocks = -(-self.model_info.max_model_len // config.block_size)
        if num_blocks > self._device.num_pages - 1:
            raise ValueError(
                f"max_model_len={self.model_info.max_model_len} is not allowed: it takes "
                f"{num_blocks} pages of {self._device.page_bytes} bytes, and the pool has "
                f"{self._device.num_pages - 1}: lower it or raise pool_bytes"
            )
        num_pages = self._device.num_pages
        self._pool = make_pool(num_pages, POLICIES[config.eviction_policy](num_pages))
        self._kv = KVManager(
            self._pool, config.block_size, config.enable_prefix_caching, KV_RESTORE_COST
        )
        self._adapters = AdapterManager(
            self._pool,
            self._device.adapter_store,
            ADAPTER_RESTORE_COST,
            self._device.num_awaited_pages,
            on_unload=self._kv.forget_prefixes,
        )
        resolver = AdapterResolver(
            self._device.adapter_store,
            self._adapters,
            config.adapter_authorization_seconds,
            on_answer=self._wake.set,
        )
        self._grammars = GrammarCompiler(
            self.model_info.tokenizer_path, self.model_info.vocab_size, self._wake.set
        )
        fitting = Fitting(self._pool, self._kv, self._adapters, self.model_info.max_model_len)
        self._lifecycle = AdapterLifecycle(
            self._device.adapter_store,
            self._adapters,
            resolver,
            fitting,
            on_fetched=self._wake.set,
        )
        self._scheduler = Scheduler(
            config, self._pool, self._kv, self._adapters, resolver, self._lifecycle, fitting
        )
        self._input_batch = InputBatch(
            config.max_num_seqs,
            self.model_info.max_model_len,
            config.block_size,
            self.model_info.vocab_size,
        )
        # Steps whose results have not been taken in, oldest first.
        self._in_flight: deque[tuple[StepBatch, PendingStep]] = deque()
        self._isolation = Isolation()
        self._num_steps = 0
        self._num_blamed = 0
        # Whether the last step found nothing to do: all requests wait for adapters and grammars.
        self._is_starved = False

    def step(self) -> list[EngineOutput]:
        """Schedule, launch, update. The device may be a step ahead: what is launched here is then
        taken in by the next call. Gives [] while there is no token to tell."""
        plan = self._scheduler.schedule(self._isolation.group())
        self._input_batch.release(plan.stopped)
        self._is_starved = not plan.num_new_tokens and not self._in_flight
        try:
            done = self._run(plan)
        except Exception as error:
            self._recover(plan, error)
            return self._scheduler.take_outputs()
        for batch, result in done:
            self._in_flight.popleft()
            self._input_batch.append_tokens(batch, result.token_ids)
            self._scheduler.update(batch, result)
            self._isolation.take_success([batch.requests[i] for i in batch.sampled.tolist()])
        return self._scheduler.take_outputs()

    def _run(self, plan: StepPlan) -> list[tuple[StepBatch, StepResult]]:
        """Launch the step, and give the results of those that must be taken in now."""
        num_ahead = 0
        if plan.num_new_tokens:
            batch = self._input_batch.build(plan)
            self._in_flight.append((batch, self._device.runner.launch(batch)))
            self._num_steps += 1
            # What penalties and grammars go by must be known before the next step is built.
            num_ahead = 0 if batch.sampling.needs_output else self._device.steps_ahead
        num_done = max(0, len(self._in_flight) - num_ahead)
        return [(batch, step.result()) for batch, step in islice(self._in_flight, num_done)]

    def _recover(self, plan: StepPlan, error: Exception) -> None:
        """Undo the steps in flight, one of which failed, and look for the request that makes them
        fail. Raises the error if that is none."""
        logger.error("A step failed; its requests are tried again in parts.", exc_info=error)
        requests = [r for batch, _ in self._in_flight for r in batch.requests]
        requests += plan.num_new_tokens
        self._in_flight.clear()
        self._scheduler.roll_back(requests)
        culprit = self._isolation.take_failure(requests, error)
        if culprit is not None:
            self._num_blamed += 1
            self._scheduler.refuse(culprit, error)

    def add_request(self, request: EngineRequest) -> None:
        """Raises RequestError for what is known at once; later failures come as outputs."""
        num_tokens = len(request.prompt_token_ids) + request.max_tokens
        if num_tokens > self.model_info.max_model_len:
            raise RequestError(
                f"prompt ({len(request.prompt_token_ids)} tokens) plus max_tokens="
                f"{request.max_tokens} is {num_tokens}, above max_model_len="
                f"{self.model_info.max_model_len}"
            )
        structure, grammar = request.sampling_params.structured_outputs, None
        if structure is not None:
            grammar = self._grammars.start(structure, request.eos_token_ids)
        num_added_tokens = max(request.prompt_token_ids) + 1 - self.model_info.vocab_size
        self._scheduler.add(
            Request(request, grammar=grammar, num_added_tokens=max(num_added_tokens, 0))
        )

    def abort_requests(self, request_ids: Sequence[str]) -> None:
        """End requests; each gets an output from the next step. Unknown ids are ignored."""
        for request_id in request_ids:
            self._scheduler.abort(request_id)

    def preload_adapter(
        self, lora_request: LoRARequest, tier: Tier = "pool", pin: bool = False
    ) -> Future[dict[str, Any]]:
        """Bring an adapter into host memory, or into the pool, which takes some steps; pin: it is
        never evicted from there. The future may have a ValueError."""
        return self._lifecycle.preload(lora_request, tier, pin)

    def locate_adapter(
        self, lora_request: LoRARequest, known_version: str = ""
    ) -> Future[dict[str, Any]]:
        """The `version` of an adapter, and if it is not the known one, the `directory` of its
        files, which are brought to this machine. The future may have a ValueError."""
        return self._lifecycle.locate(lora_request, known_version)

    def unpin_adapter(self, lora_request: LoRARequest) -> dict[str, Any]:
        """Let an adapter be evicted again. Raises RequestError."""
        return self._lifecycle.unpin(lora_request)

    def refresh_adapter(self, lora_request: LoRARequest) -> Future[dict[str, Any]]:
        """Have new requests get the version that the source has now, when it has been read, which
        takes some steps. The future may have a ValueError."""
        return self._lifecycle.refresh(lora_request)

    def unload_adapter(
        self, lora_request: LoRARequest, abort: bool = False, delete_files: bool = False
    ) -> dict[str, Any]:
        """Free all that an adapter takes when the last request that has it ends; abort: now.

        delete_files: also what was downloaded.
        """
        in_use = self._lifecycle.unload(lora_request, delete_files)
        num_requests = sum(adapter.num_requests for adapter in in_use)
        for adapter in in_use if abort else ():
            self._scheduler.end_all_of(adapter)
        return {"num_requests": num_requests}

    def adapters(self) -> list[dict[str, Any]]:
        """The state of each adapter that the engine knows."""
        return self._lifecycle.describe_all()

    def has_unfinished_requests(self) -> bool:
        """Whether there is anything to step for."""
        return self._scheduler.has_unfinished_requests() or bool(self._in_flight)

    def wait_for_work(self, timeout: float) -> None:
        """Wait until an adapter or a grammar came closer, or for so many seconds; not if there is
        work now."""
        if self._is_starved:
            self._wake.wait(timeout)
        self._wake.clear()

    def stats(self) -> dict[str, Any]:
        """Page counts by state, requests, and counters since the start."""
        pages = {name: self._pool.count(state) for state, name in STATE_NAMES.items()}
        return {
            "pages_total": self._pool.num_usable,
            **pages,
            "page_bytes": self._device.page_bytes,
            "num_running": self._scheduler.num_running,
            "num_waiting": self._scheduler.num_waiting,
            "num_fetching": self._scheduler.num_fetching,
            "num_adapters_resident": self._adapters.num_resident(),
            "steps": self._num_steps,
            "requests_isolated": self._num_blamed,
            "preemptions": self._scheduler.num_preemptions,
            "adapter_loads": self._adapters.num_loads,
            "adapter_evictions": self._adapters.num_evictions,
            "adapters": self._adapters.tally.as_dict(),
            **self._device.adapter_store.stats(),
            "prefix_hit_tokens": self._scheduler.num_prefix_hit_tokens,
            "prompt_tokens": self._scheduler.num_prompt_tokens,
            "output_tokens": self._scheduler.num_output_tokens,
        }

    def check_integrity(self) -> None:
        """Assert that every page has one owner and every count adds up."""
        self._scheduler.check_integrity([batch for batch, _ in self._in_flight])

    def shutdown(self) -> None:
        """Give back threads and memory; the core is of no use afterwards."""
        self._grammars.close()
        self._device.close()
