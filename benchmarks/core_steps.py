"""Drives an EngineCore step by step, as the engine's own process does, without text and HTTP."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from loraplex.engine.config import EngineConfig
from loraplex.engine.core import DeviceBuilder, EngineCore, build_device
from loraplex.engine.lora_request import LoRARequest
from loraplex.engine.messages import EngineOutput, EngineRequest
from loraplex.engine.sampling_params import SamplingParams

WAIT_SECONDS = 0.1
LOAD_PROMPT_LEN = 8


def require_seqs(engine_options: Mapping[str, Any], least: int) -> None:
    """ValueError if fewer requests than these may run at once."""
    if engine_options["max_num_seqs"] < least:
        raise ValueError(
            f"max_num_seqs={engine_options['max_num_seqs']} is not allowed: so many requests must "
            f"run at once that it is {least} at least"
        )


@contextmanager
def started_core(config: EngineConfig, build: DeviceBuilder = build_device) -> Iterator[EngineCore]:
    """A core until this is left; prints how long it took to start.

    What is there by then is left out of later garbage collections, as in the engine's own process:
    else one in a step now and then goes through all modules, for a hundred milliseconds.
    """
    began = time.perf_counter()
    core = EngineCore(config, build)
    gc.collect()
    gc.freeze()
    print(f"start-up {time.perf_counter() - began:.1f} s", flush=True)
    try:
        yield core
    finally:
        gc.unfreeze()
        core.shutdown()


class Prompts:
    """Random token ids, so that no two prompts begin alike. Seeded."""

    def __init__(self, vocab_size: int) -> None:
        self._rng, self._vocab_size = np.random.default_rng(0), vocab_size

    def draw(self, length: int) -> list[int]:
        return self._rng.integers(self._vocab_size, size=length).tolist()


def make_request(
    request_id: str, prompt_token_ids: list[int], max_tokens: int, adapter: Path | str | None = None
) -> EngineRequest:
    """Greedy, to this length; adapter: its directory."""
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=prompt_token_ids,
        sampling_params=SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True),
        max_tokens=max_tokens,
        eos_token_ids=[],
        seed=0,
        lora_request=None if adapter is None else LoRARequest(str(adapter), str(adapter)),
    )


def step(core: EngineCore) -> list[EngineOutput]:
    """One step; waits where there is nothing to do but loads. RuntimeError if a request failed."""
    outputs = core.step()
    for output in outputs:
        if output.error is not None:
            raise RuntimeError(f"request {output.request_id} failed: {output.error}")
    if not outputs:
        core.wait_for_work(WAIT_SECONDS)
    return outputs


def start_all(core: EngineCore, requests: Sequence[EngineRequest]) -> Counter[str]:
    """Step until each of the requests has had a token; how many each has had."""
    for request in requests:
        core.add_request(request)
    counts: Counter[str] = Counter()
    while len(counts) < len(requests):
        counts.update(output.request_id for output in step(core))
    return counts


def end_all(core: EngineCore, request_ids: Iterable[str] = ()) -> None:
    """Abort these, and step until nothing is left to do."""
    core.abort_requests(list(request_ids))
    while core.has_unfinished_requests():
        step(core)


def load_adapters(core: EngineCore, adapters: Sequence[Path], prompts: Prompts) -> None:
    """Use each adapter once, for a token: then it is in the pool, as far as that has room."""
    for adapter in adapters:
        prompt = prompts.draw(LOAD_PROMPT_LEN)
        core.add_request(make_request(f"load {adapter}", prompt, 1, adapter))
    end_all(core)
