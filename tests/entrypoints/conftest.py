"""One server for all tests that don't break it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from server_process import ServerProcess, running_server


def make_adapter_directory(path: Path) -> Path:
    """What the server takes for an adapter before the engine reads it."""
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    return path


@pytest.fixture(scope="session")
def adapter_root(tmp_path_factory) -> Path:
    """Directories of adapters; those with "missing" or "broken" in their names fail."""
    root = tmp_path_factory.mktemp("adapters")
    for name in ("sql", "poet", "broken", "missing"):
        make_adapter_directory(root / name)
    return root


@pytest.fixture(scope="session")
def server(adapter_root) -> Iterator[ServerProcess]:
    modules = [f"{path.name}={path}" for path in sorted(adapter_root.iterdir())]
    with running_server("--trust-request-chat-template", "--lora-modules", *modules) as server:
        yield server
        assert server.stop() == 0
        assert "Traceback" not in server.log


@pytest.fixture
def client(server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client
