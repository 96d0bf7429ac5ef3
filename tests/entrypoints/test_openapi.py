"""Whatever comes in, the server answers, and not with an error of its own: requests made from its
OpenAPI document, and valid bodies that were damaged at random."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

import httpx
import hypothesis
import psutil
import pytest
import schemathesis
from fake_device import EOS_TOKEN_ID
from schemathesis.checks import not_a_server_error
from server_process import ServerProcess, running_server
from tiny_tokenizer import write_tokenizer

BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"model": "fake", "prompt": "hello", "max_tokens": 3, "stop": ["x"],
                         "logit_bias": {"5": 1.5}, "n": 2, "seed": 3, "echo": True}),
    ("/v1/completions", {"model": "fake", "prompt": [[1, 2], [3]], "max_tokens": 3, "stream": True,
                         "stream_options": {"include_usage": True}, "temperature": 0.5}),
    ("/v1/chat/completions", {"model": "fake", "max_completion_tokens": 4, "top_p": 0.5, "messages":
                              [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}),
    ("/v1/chat/completions", {"model": "fake", "max_tokens": 3, "stream": True, "messages":
                              [{"role": "system", "content": "x"}, {"role": "user", "content": ""}],
                              "tools": [{"type": "function", "function": {"name": "f",
                              "parameters": {"type": "object"}}}], "tool_choice": "auto"}),
    ("/", {"inputs": "hello", "parameters": {"max_new_tokens": 3, "details": True}}),
    ("/generate", {"inputs": "hello", "parameters": {
        "best_of": 2, "do_sample": True, "return_k_alternatives": 2, "max_new_tokens": 3,
        "decoder_input_details": True, "stop": ["a"], "truncate": 2, "top_k": 4}}),
    ("/generate_stream", {"inputs": "hello", "parameters": {"max_new_tokens": 3, "seed": 1}}),
    ("/generate", {"inputs": "x", "parameters": {"merged_adapters": {
        "ids": ["a", "b"], "weights": [0.5, 0.5], "merge_strategy": "ties", "density": 0.5}}}),
    ("/tokenize", {"inputs": "hello", "add_special_tokens": False}),
    ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/tmp"}),
    ("/v1/unload_lora_adapter", {"lora_name": "x"}),
]  # fmt: skip
JUNK: list[Any] = [
    None, True, 0, -1, 1, 2**31, 2**63, 2**64, 10**30, -0.5, 1e308, 1e-300, "", "x", "\u0000",
    "\ud83d\ude00", "x" * 5000, "../../etc/passwd", [], [[]], [None], {}, {"": {}}, [1] * 2000,
    {"type": "text"}, {"role": "user"},
]  # fmt: skip


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with the real scheduler and grammars, which is at rest again at the end."""
    flags = ("--core", "make_scheduled_core", "--max-completions", "4", "--no-access-log")
    tokenizer_path = write_tokenizer(tmp_path_factory.mktemp("tokenizer"), EOS_TOKEN_ID)
    environment = {"FAKE_STEP_SECONDS": "0", "FAKE_TOKENIZER": str(tokenizer_path)}
    with running_server(*flags, **environment) as server:
        process = psutil.Process(server.process.pid)
        num_files = process.num_fds()
        yield server
        for name in ("num_requests_running", "num_requests_waiting", 'pages{state="kv"}'):
            server.wait_for_metric(f"loraplex_{name}", 0)
        # The connection that metrics are read by may have been made since.
        assert process.num_fds() <= num_files + 2
        assert "Traceback" not in server.log
        assert server.metric("loraplex_engine_restarts_total") == 0
        assert server.stop() == 0


def check_documented_requests(server: ServerProcess, num_cases: int) -> None:
    """At least so many cases, shared between the operations."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 20
    # Those that take no input have one case only, and leave the rest to the others.
    operations.sort(key=lambda operation: operation.method != "get")
    num_asked = 0
    for index, operation in enumerate(operations):
        share = -(-(num_cases - num_asked) // (len(operations) - index))

        @hypothesis.settings(
            max_examples=share, deadline=None, database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )  # fmt: skip
        @hypothesis.seed(0)
        @hypothesis.given(case=operation.as_strategy())
        def ask(case: schemathesis.Case) -> None:
            nonlocal num_asked
            num_asked += 1
            case.call_and_validate(checks=[not_a_server_error], timeout=20)

        ask()
    assert num_asked >= num_cases


def check_damaged_bodies(server: ServerProcess, num_cases: int) -> None:
    rng = random.Random(0)
    with httpx.Client(base_url=server.url, timeout=20) as client:
        for number in range(num_cases):
            path, body = BODIES[number % len(BODIES)]
            content = damage(body, rng)
            answer = client.post(
                path, content=content, headers={"content-type": "application/json"}
            )
            assert answer.status_code < 500, (path, content, answer.text)
            if answer.status_code >= 400:
                assert "error" in answer.json(), (path, content, answer.text)


def damage(body: dict[str, Any], rng: random.Random) -> bytes:
    """The body with one to three values replaced, added or left out, or with other bytes."""
    body = copy.deepcopy(body)
    for _ in range(rng.randint(1, 3)):
        places = list(walk(body))
        if not places:
            break
        container, key = rng.choice(places)
        action = rng.random()
        if action < 0.6:
            container[key] = copy.deepcopy(rng.choice(JUNK))
        elif action < 0.8:
            del container[key]
        elif isinstance(container, dict):
            name = rng.choice(["x", "model", "n", "stream", "stop", ""])
            container[name] = copy.deepcopy(rng.choice(JUNK))
        else:
            container.append(copy.deepcopy(rng.choice(JUNK)))
    content = bytearray(json.dumps(body).encode())
    if rng.random() < 0.2:
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content)


def walk(value: Any) -> Iterator[tuple[Any, Any]]:
    """All places in a JSON value, as containers with keys."""
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    for key in list(keys):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from walk(value[key])


def test_documented_requests(target):
    check_documented_requests(target, 120)


def test_damaged_bodies(target):
    check_damaged_bodies(target, 400)


@pytest.mark.slow
def test_five_thousand_documented_requests(target):
    check_documented_requests(target, 5000)


@pytest.mark.slow
def test_five_thousand_damaged_bodies(target):
    check_damaged_bodies(target, 5000)
