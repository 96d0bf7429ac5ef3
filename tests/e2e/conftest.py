from __future__ import annotations

from pathlib import Path

import hub_server
import pytest
from adapter_stores import AdapterMaker
from transformers import AutoTokenizer

from loraplex.benchmarks.synthetic_adapters import write_adapter
from loraplex.benchmarks.synthetic_model import write_model
from loraplex.engine.config import EngineConfig
from loraplex.engine.models.locate import locate_model
from loraplex.engine.models.registry import lora_spec

hub, server = hub_server.hub, hub_server.server

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
# Ranks and module subsets of the oracle tests: every rank class, every module alone or in company.
ADAPTERS = {
    "r1": (1, ["q_proj", "v_proj"]),
    "r4": (4, ATTENTION),
    "r8": (8, MLP),
    "r12": (12, ["down_proj"]),
    "r16": (16, ATTENTION + MLP),
    "r32": (32, ["k_proj", "gate_proj"]),
    "r64": (64, ["o_proj", "up_proj", "q_proj"]),
    "r256": (256, ATTENTION + MLP),
}


@pytest.fixture(scope="session")
def model_path() -> Path:
    return locate_model(EngineConfig().model)


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters with random weights, large enough to change most tokens."""
    spec, _ = lora_spec(EngineConfig().model)
    directory = tmp_path_factory.mktemp("adapters")
    return {
        name: write_adapter(directory / name, spec, rank=rank, modules=modules, seed=rank)
        for name, (rank, modules) in ADAPTERS.items()
    }


@pytest.fixture(scope="session")
def long_text_ids(model_path: Path) -> list[int]:
    """A few thousand tokens of text, to cut prompts of any length from."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    text = (Path(__file__).parents[2] / "LICENSE").read_text()
    return tokenizer(text).input_ids


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny one, of random weights."""
    return write_model(tmp_path_factory.mktemp("model"), "tiny")


@pytest.fixture
def make(model: Path, tmp_path: Path) -> AdapterMaker:
    return AdapterMaker(model, tmp_path / "adapters")
