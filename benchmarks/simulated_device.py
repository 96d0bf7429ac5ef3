"""A device half in simulated time, without a model: Llama-3-8B on an H100, by a cost model.

Steps and copies of adapters take the time that the cost model says, on a clock that jumps; tokens
are random. It runs a step ahead of the host, as GPUs do. The host takes no time, and all adapters
are in host memory.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from loraplex.benchmarks.workloads import LLAMA_3_VOCAB_SIZE
from loraplex.engine.adapters.store import AdapterFiles, Identity
from loraplex.engine.lora_request import LoRARequest
from loraplex.engine.messages import ModelInfo
from loraplex.engine.step import StepBatch, StepResult
from loraplex.lora.spec import AdapterTraits

NUM_LAYERS, HIDDEN_SIZE = 32, 4096
# Of adapters, that a step waits for to be copied: as loraplex.engine.runner.device has it.
AWAITED_COPY_BYTES = 128 << 20


@dataclass(frozen=True)
class CostModel:
    """Bytes, and bytes and FLOPs per second. Weights, and each request's KV and each adapter of a
    step, are read once; a step of many tokens is bound by arithmetic instead."""

    weight_bytes: float = 15.0e9
    page_bytes: int = 2 << 20
    """16 tokens of KV."""
    block_size: int = 16
    adapter_pages: int = 13
    """27 MB: rank 16 on q, k, v and o."""
    flops: float = 690e12
    memory_bandwidth: float = 2.3e12
    copy_bandwidth: float = 50e9

    def step_seconds(self, batch: StepBatch) -> float:
        # The weights have two bytes each, and cost two FLOPs a token.
        linears = self.weight_bytes * max(
            1 / self.memory_bandwidth, len(batch.token_ids) / self.flops
        )
        contexts = batch.seq_lens.astype(np.float64)
        pairs = float((batch.num_new_tokens * (contexts - batch.num_new_tokens / 2)).sum())
        attention = pairs * 4 * NUM_LAYERS * HIDDEN_SIZE / self.flops
        num_pages = contexts.sum() / self.block_size + np.count_nonzero(batch.page_tables)
        return linears + attention + float(num_pages) * self.page_bytes / self.memory_bandwidth

    def copy_seconds(self, num_pages: int) -> float:
        return num_pages * self.page_bytes / self.copy_bandwidth


class SimulatedDevice:
    """See loraplex.engine.core.Device; it is its own runner."""

    steps_ahead = 1

    def __init__(self, costs: CostModel, num_pages: int, max_model_len: int) -> None:
        self.costs = costs
        self.num_pages = num_pages
        self.page_bytes = costs.page_bytes
        self.num_awaited_pages = AWAITED_COPY_BYTES // costs.page_bytes
        self.now = 0.0
        """Seconds since the start."""
        self.busy_until = 0.0
        """When the steps launched so far end."""
        self.busy_seconds = 0.0
        """What they took, waiting for copies included."""
        self.num_steps = 0
        self._waited_at = -1.0, -1  # The time and the steps launched when `wait` was called last.
        self.adapter_store = SimulatedStore(self)
        self._rng = np.random.default_rng(0)
        self.model_info = ModelInfo(
            model_name="simulated",
            tokenizer_path="",
            max_model_len=max_model_len,
            vocab_size=LLAMA_3_VOCAB_SIZE,
            eos_token_ids=[],
            dtype="float32",
            device="cpu",
        )

    @property
    def runner(self) -> SimulatedDevice:
        return self

    def launch(self, batch: StepBatch) -> SimulatedStep:
        ready = max(self.now, self.busy_until)
        end = max(ready, self.adapter_store.step_may_begin) + self.costs.step_seconds(batch)
        self.busy_seconds += end - ready
        self.busy_until = end
        self.num_steps += 1
        tokens = self._rng.integers(LLAMA_3_VOCAB_SIZE, size=len(batch.sampled))
        return SimulatedStep(self, end, tokens.tolist())

    def wait(self, until: float) -> None:
        """See loraplex.benchmarks.replay.Clock. The time goes by at once."""
        state = self.now, self.num_steps
        if state == self._waited_at:
            copied_at = self.adapter_store.copied_at
            self.now = min(until, copied_at if copied_at > self.now else until)
        # What was launched, or taken in, since the last call gives something to do.
        self._waited_at = state

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class SimulatedFiles:
    """An adapter that is nothing but its name."""

    name: str
    num_downloads: int = 0

    @property
    def key(self) -> bytes:
        return self.name.encode()

    def close(self) -> None:
        pass


def identify(lora_request: LoRARequest) -> Identity:
    return Identity(((lora_request.lora_path, None),), None)


def fetched(lora_request: LoRARequest) -> Future[AdapterFiles]:
    future: Future[AdapterFiles] = Future()
    future.set_result(SimulatedFiles(lora_request.lora_path))
    return future


class SimulatedStore:
    """All adapters, of one size, in host memory, and one copy at a time."""

    def __init__(self, device: SimulatedDevice) -> None:
        self._device = device
        self.copied_at = 0.0
        """When the copies begun so far end."""
        self.step_may_begin = 0.0
        """When those end that the next step waits for."""

    def identify(self, lora_request: LoRARequest) -> Identity:
        return identify(lora_request)

    def fetch(self, lora_request: LoRARequest) -> Future[AdapterFiles]:
        return fetched(lora_request)

    def num_pages(self, files: AdapterFiles) -> int:
        return self._device.costs.adapter_pages

    def traits(self, version: bytes) -> AdapterTraits:
        return AdapterTraits(max_rank=16, module_mask=1)

    def drop(self, version: bytes) -> None:
        pass

    def holds(self, version: bytes) -> bool:
        return True

    def read_interval(self, version: bytes) -> tuple[float, float]:
        return 0.0, 0.0

    def stats(self) -> dict[str, Any]:
        return {}

    def copy_to_pages(
        self, version: bytes, pages: list[int], after_steps: bool, before_steps: bool
    ) -> Future[None]:
        device = self._device
        begin = max(device.now, self.copied_at, device.busy_until if after_steps else 0.0)
        self.copied_at = begin + device.costs.copy_seconds(len(pages))
        if before_steps:
            self.step_may_begin = self.copied_at
        return SimulatedCopy(device, self.copied_at)


class SimulatedStep:
    def __init__(self, device: SimulatedDevice, end: float, token_ids: list[int]) -> None:
        self._device, self._end, self._token_ids = device, end, token_ids

    def result(self) -> StepResult:
        self._device.now = max(self._device.now, self._end)
        return StepResult(self._token_ids, logprobs=None, prompt_logprobs=[])


class SimulatedCopy(Future[None]):
    """A copy that is done when the clock says so."""

    def __init__(self, device: SimulatedDevice, end: float) -> None:
        super().__init__()
        self._device, self._end = device, end

    def done(self) -> bool:
        return self._device.now >= self._end

    def result(self, timeout: float | None = None) -> None:
        assert self.done()
