"""What an engine takes is free again when nobody has it any more."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

from tiny_model import tiny_llm, write_tiny_model

from loraplex.engine.sampling_params import SamplingParams


def test_a_dropped_engine_is_gone_at_once(tmp_path: Path) -> None:
    """Without the garbage collector, which does not look at what was there when an LLM began."""
    llm = tiny_llm(write_tiny_model(tmp_path / "model"))
    llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2), use_tqdm=False)
    core = llm._core
    parts = [weakref.ref(part) for part in (core, core._device.runner._model, core._pool)]
    gc.disable()
    try:
        del core, llm
        assert [part() for part in parts] == [None, None, None]
    finally:
        gc.enable()
