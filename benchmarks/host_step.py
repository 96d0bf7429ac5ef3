"""Host cost of a step: schedule, batch building and bookkeeping for many running requests.

The device is left out: a runner that returns random tokens at once. What is measured is what the
engine's own Python costs per step, while the requests decode.

    python benchmarks/host_step.py
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

from loraplex.benchmarks.results import write_result
from loraplex.benchmarks.simulated_device import fetched, identify
from loraplex.engine.config import EngineConfig
from loraplex.engine.core import EngineCore
from loraplex.engine.lora_request import LoRARequest
from loraplex.engine.messages import EngineRequest, ModelInfo
from loraplex.engine.sampling_params import SamplingParams
from loraplex.engine.step import FinishedStep, StepBatch, StepResult
from loraplex.lora.spec import AdapterTraits

VOCAB_SIZE = 32_000


class NullStore:
    """Adapters of two pages that are always in host memory."""

    def identify(self, lora_request):
        return identify(lora_request)

    def fetch(self, lora_request):
        return fetched(lora_request)

    def num_pages(self, files):
        return 2

    def traits(self, version):
        return AdapterTraits(max_rank=16, module_mask=1)

    def drop(self, version):
        pass

    def holds(self, version):
        return True

    def read_interval(self, version):
        return 0.0, 0.0

    def stats(self):
        return {}

    def copy_to_pages(self, version, pages, after_steps, before_steps):
        from concurrent.futures import Future

        future: Future[None] = Future()
        future.set_result(None)
        return future


class NullRunner:
    def launch(self, batch: StepBatch) -> FinishedStep:
        tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, len(batch.sampled))
        return FinishedStep(StepResult(tokens.tolist(), logprobs=None, prompt_logprobs=[]))


class NullDevice:
    page_bytes = 1
    num_pages = 100_000
    steps_ahead = 0
    num_awaited_pages = 0

    def __init__(self) -> None:
        self.runner = NullRunner()
        self.adapter_store = NullStore()
        self.model_info = ModelInfo(
            model_name="null",
            tokenizer_path="",
            max_model_len=4096,
            vocab_size=VOCAB_SIZE,
            eos_token_ids=[],
            dtype="float32",
            device="cpu",
        )

    def close(self) -> None:
        pass


def measure(num_requests: int, num_adapters: int, params: SamplingParams) -> list[float]:
    """Milliseconds of each decode step with all requests running."""
    config = EngineConfig(max_num_seqs=num_requests, max_num_batched_tokens=8192)
    core = EngineCore(config, lambda config, wake: NullDevice())
    for i in range(num_requests):
        name = f"a{i % num_adapters}" if num_adapters else None
        core.add_request(
            EngineRequest(
                request_id=str(i),
                prompt_token_ids=list(range(64 + i % 64)),
                sampling_params=params,
                max_tokens=400,
                eos_token_ids=[2],
                seed=i,
                lora_request=name and LoRARequest(name, name),
            )
        )
    while core.stats()["num_running"] < num_requests or core.stats()["num_waiting"]:
        core.step()
    for _ in range(20):
        core.step()
    times = []
    for _ in range(200):
        start = time.perf_counter()
        outputs = core.step()
        times.append((time.perf_counter() - start) * 1e3)
        assert len(outputs) == num_requests
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-requests", type=int, default=256)
    args = parser.parse_args()
    rows = []
    cases = {
        "greedy": SamplingParams(temperature=0, max_tokens=400),
        "temperature, top_p": SamplingParams(temperature=0.8, top_p=0.9, max_tokens=400),
        "penalties": SamplingParams(temperature=0.8, presence_penalty=0.5, max_tokens=400),
    }
    for name, params in cases.items():
        for num_adapters in (0, 16, args.num_requests):
            times = sorted(measure(args.num_requests, num_adapters, params))
            row = {
                "sampling": name,
                "num_requests": args.num_requests,
                "num_adapters": num_adapters,
                "median_ms": round(statistics.median(times), 3),
                "p99_ms": round(times[int(len(times) * 0.99)], 3),
            }
            print(row)
            rows.append(row)
    write_result("host_step", rows)


if __name__ == "__main__":
    main()
