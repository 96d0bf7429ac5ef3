"""Factories of fake cores, for whoever starts an engine process.

What a prompt's text asks for: "long" is answered with letters without end, "crash" breaks the step
in which it would run, "die" ends the process without a word; anything else is echoed.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from fake_device import FakeDevice
from fakes import EOS, FakeCore, echo

from loraplex.engine.config import EngineConfig
from loraplex.engine.core import EngineCore
from loraplex.engine.lora_request import LoRARequest
from loraplex.engine.messages import EngineOutput, EngineRequest

STEP_SECONDS = float(os.environ.get("FAKE_STEP_SECONDS", "0.001"))


class Letters(Sequence):
    """a, b, c, ... z, a, b, ..."""

    def __len__(self) -> int:
        return 1 << 60

    def __getitem__(self, index: Any) -> int:
        return ord("a") + index % 26


def example(schema: dict[str, Any]) -> Any:
    """Something that a simple JSON schema allows."""
    match schema["type"]:
        case "object":
            return {name: example(field) for name, field in schema["properties"].items()}
        case "string":
            return "x"
        case kind:
            return {"integer": 1, "number": 1.5, "boolean": True, "array": []}[kind]


def reply(request: EngineRequest) -> Sequence[int]:
    structure = request.sampling_params.structured_outputs
    if structure is not None and structure.json is not None:
        return [*json.dumps(example(json.loads(structure.json))).encode(), EOS]
    if b"long" in bytes(t for t in request.prompt_token_ids if t < 256):
        return Letters()
    return echo(request)


class ServedCore(FakeCore):
    """Takes STEP_SECONDS for a step, and counts."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(
            reply, max_model_len=config.max_model_len or 1024, max_num_seqs=config.max_num_seqs
        )
        self.num_tokens = 0
        self.locating: list[tuple[Path, Future[dict[str, Any]]]] = []

    def locate_adapter(
        self, lora_request: LoRARequest, known_version: str = ""
    ) -> Future[dict[str, Any]]:
        """In FAKE_HUB, if the environment has it, by the last part of the path, and not while a
        file of that name with ".held" at its end is there."""
        if "FAKE_HUB" not in os.environ:
            return super().locate_adapter(lora_request)
        directory = Path(os.environ["FAKE_HUB"]) / lora_request.lora_path.rpartition("/")[-1]
        self.located.append(lora_request.lora_path)
        self.locating.append((directory, Future()))
        return self.locating[-1][-1]

    def has_unfinished_requests(self) -> bool:
        return bool(self.locating) or super().has_unfinished_requests()

    def step(self) -> list[EngineOutput]:
        for directory, future in self.locating.copy():
            if not directory.with_suffix(".held").exists():
                self.locating.remove((directory, future))
                future.set_result({"directory": str(directory), "version": directory.name})
        for request in self.requests.values():
            text = bytes(t for t in request.prompt_token_ids if t < 256)
            if b"crash" in text:
                raise RuntimeError("the fake accelerator fell off the bus")
            if b"die" in text:
                os.kill(os.getpid(), signal.SIGKILL)
        if self.requests:
            time.sleep(STEP_SECONDS)
        outputs = super().step()
        self.num_tokens += sum(len(output.new_token_ids) for output in outputs)
        return outputs

    def stats(self) -> dict[str, Any]:
        return {
            **super().stats(),
            "num_seen": len(self.seen),
            "adapter_fetches": len(self.located),
            "num_aborted": len(self.aborted),
            "steps": self.num_steps,
            "output_tokens": self.num_tokens,
            "preemptions": 0,
            "adapter_loads": 0,
            "adapter_evictions": 0,
            "prefix_hit_tokens": 0,
        }


def make_core(config: EngineConfig) -> FakeCore:
    return ServedCore(config)


class PacedCore(EngineCore):
    """The real core on a device without a model, which takes STEP_SECONDS for a step."""

    def step(self) -> list[EngineOutput]:
        time.sleep(STEP_SECONDS)
        return super().step()


def make_scheduled_core(config: EngineConfig) -> EngineCore:
    device = FakeDevice(
        num_pages=400,
        max_model_len=config.max_model_len or 128,
        block_size=config.block_size,
        steps_ahead=1,
        num_awaited_pages=0,
        tokenizer_path=os.environ.get("FAKE_TOKENIZER", ""),
    )
    return PacedCore(config, lambda config, wake: device)


def refuse_config(config: EngineConfig) -> FakeCore:
    raise ValueError("pool_bytes=1 is not allowed: it must be more")


def make_core_once(config: EngineConfig) -> FakeCore:
    """Breaks at every start but the first."""
    marker = Path(os.environ["FAKE_MARKER"])
    if marker.exists():
        raise OSError("the accelerator is gone")
    marker.touch()
    return ServedCore(config)


def break_at_start(config: EngineConfig) -> FakeCore:
    raise OSError("no such accelerator")


def never_start(config: EngineConfig) -> FakeCore:
    time.sleep(3600)
    raise AssertionError("nobody waits so long")
