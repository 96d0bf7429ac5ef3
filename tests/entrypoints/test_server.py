"""The server as a process: who may call, clients that leave, engines that die, and its end."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest
from server_process import FAKE_SERVER, popen_server, running_server, wait_until_gone

RUNNING = "loraplex_num_requests_running"
WAITING = "loraplex_num_requests_waiting"
LONG = {"model": "fake", "prompt": "long", "max_tokens": 1000}


def test_models(client, adapter_root):
    base, *adapters = client.models.list().data
    assert (base.id, base.parent, base.max_model_len) == ("fake", None, 1024)
    assert base.root == "smollm2-135m-instruct"
    assert [card.id for card in adapters] == ["broken", "missing", "poet", "sql"]
    assert all(card.parent == "fake" for card in adapters)
    assert adapters[2].root == str(adapter_root / "poet")
    assert client.models.retrieve("poet").root == adapters[2].root
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_health_and_version(server):
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert httpx.get(f"{server.url}/version").json() == {"version": "0.1.0"}


def test_metrics(server, client):
    client.completions.create(model="fake", prompt="hello")
    text = httpx.get(f"{server.url}/metrics").text
    for line in [
        'loraplex_pages{state="free"} ',
        'loraplex_pages{state="kv"} ',
        'loraplex_pages{state="kv_cached"} ',
        'loraplex_pages{state="adapter"} ',
        'loraplex_pages{state="adapter_idle"} ',
        "loraplex_num_requests_running ",
        "loraplex_num_requests_waiting ",
        "loraplex_num_preemptions_total ",
        "loraplex_adapter_loads_total ",
        "loraplex_adapter_evictions_total ",
        "loraplex_prefix_cache_hit_tokens_total ",
        'loraplex_requests_total{adapter=""} ',
        'loraplex_request_success_total{finished_reason="stop"} ',
        "loraplex_prompt_tokens_total ",
        "loraplex_generation_tokens_total ",
        "loraplex_time_to_first_token_seconds_bucket{",
        "loraplex_time_per_output_token_seconds_bucket{",
        "loraplex_request_queue_time_seconds_bucket{",
        "loraplex_e2e_request_latency_seconds_bucket{",
    ]:
        assert f"\n{line}" in text, line


def test_metrics_count_what_happened(server, client):
    names = {
        'loraplex_request_success_total{finished_reason="stop"}': 2,
        'loraplex_request_success_total{finished_reason="length"}': 2,
        'loraplex_request_failure_total{status="404"}': 1,
        "loraplex_prompt_tokens_total": 6 + 5,
        "loraplex_generation_tokens_total": 2 * 6 + 2 * 3,
        "loraplex_time_to_first_token_seconds_count": 2,
        "loraplex_e2e_request_latency_seconds_count": 2,
    }
    before = {name: server.metric(name) for name in names}
    client.completions.create(model="fake", prompt="hello", n=2)
    list(client.completions.create(model="sql", prompt="long", n=2, max_tokens=3, stream=True))
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="missing", prompt="x")
    assert {name: server.metric(name) - before[name] for name in names} == names


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "prompt", ["long", ["long", "long"]], ids=["one prompt", "several prompts"]
)
def test_a_client_that_leaves_ends_its_request_in_the_core(server, prompt, stream):
    before = server.metric('loraplex_request_success_total{finished_reason="abort"}')
    num_prompts = 2 if isinstance(prompt, list) else 1
    body = {**LONG, "prompt": prompt, "stream": stream}

    def leave_early() -> None:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json=body, timeout=0.3)

    def read_a_little() -> None:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            assert server.metric(RUNNING) == num_prompts

    (read_a_little if stream else leave_early)()
    # Left alone, it would run for a second and more.
    server.wait_for_metric(RUNNING, 0, timeout=0.8)
    after = server.metric('loraplex_request_success_total{finished_reason="abort"}')
    assert after - before == num_prompts


async def test_64_streams_of_which_some_are_cancelled_leave_nothing_behind(server):
    rng = random.Random(0)
    finished = []

    async def stream(client: openai.AsyncOpenAI, number: int) -> None:
        is_cancelled = number % 10 == 0
        answer = await client.chat.completions.create(
            model=rng.choice(["fake", "poet", "sql"]),
            messages=[{"role": "user", "content": "long" if is_cancelled else f"number {number}"}],
            stream=True,
        )
        text = ""
        async for chunk in answer:
            text += chunk.choices[0].delta.content
            if is_cancelled and len(text) > 5:
                await answer.close()
                return
        assert text == f"user: number {number}assistant: "
        finished.append(number)

    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0
    ) as client:
        await asyncio.gather(*(stream(client, number) for number in range(64)))
    assert len(finished) == 64 - 7
    for name in (RUNNING, WAITING, 'loraplex_pages{state="kv"}'):
        server.wait_for_metric(name, 0)


def test_adapters_come_and_go_below_the_allowed_directory_only(adapter_root, tmp_path):
    def post(action: str, **body) -> httpx.Response:
        return httpx.post(f"{server.url}/v1/{action}_lora_adapter", json=body)

    with running_server("--allow-runtime-lora", str(adapter_root)) as server:
        poet = {"lora_name": "poet", "lora_path": str(adapter_root / "poet")}
        response = post("load", **poet)
        assert (response.status_code, response.text) == (
            200,
            "Success: LoRA adapter 'poet' added successfully.",
        )
        assert [m["id"] for m in httpx.get(f"{server.url}/v1/models").json()["data"]] == [
            "fake",
            "poet",
        ]
        body = {"model": "poet", "prompt": "hello"}
        assert httpx.post(f"{server.url}/v1/completions", json=body).status_code == 200
        assert post("load", **poet).status_code == 400
        assert post("load", **{**poet, "lora_name": "fake"}).status_code == 400
        assert post("load", lora_name="x").status_code == 400
        assert post("load", lora_name="", lora_path=poet["lora_path"]).status_code == 400
        nowhere = str(adapter_root / "nowhere")
        assert post("load", lora_name="x", lora_path=nowhere).status_code == 404
        (tmp_path / "adapter_config.json").write_text("{}")
        for outside in (str(tmp_path), f"{adapter_root}/../{tmp_path.name}", "/etc"):
            assert post("load", lora_name="x", lora_path=outside).status_code == 403
        (adapter_root / "link").symlink_to(tmp_path)
        assert post("load", lora_name="x", lora_path=str(adapter_root / "link")).status_code == 403
        (adapter_root / "link").unlink()
        response = post("unload", lora_name="poet")
        assert (response.status_code, response.text) == (
            200,
            "Success: LoRA adapter 'poet' removed successfully.",
        )
        assert post("unload", lora_name="poet").status_code == 404
        assert httpx.post(f"{server.url}/v1/completions", json=body).status_code == 404


def test_adapters_can_not_be_changed_by_default(server, adapter_root):
    for action in ("load", "unload"):
        response = httpx.post(
            f"{server.url}/v1/{action}_lora_adapter",
            json={"lora_name": "x"} | ({"lora_path": "/x"} if action == "load" else {}),
        )
        assert response.status_code == 403
        assert "--allow-runtime-lora" in response.json()["error"]["message"]


def test_served_model_names(adapter_root):
    flags = ("--served-model-name", "one", "two", "--lora-modules", f"sql={adapter_root}/sql")
    with running_server(*flags) as server:
        cards = httpx.get(f"{server.url}/v1/models").json()["data"]
        assert [(c["id"], c["parent"]) for c in cards] == [
            ("one", None),
            ("two", None),
            ("sql", "one"),
        ]
        url = f"{server.url}/v1/completions"
        for model, status in (("one", 200), ("two", 200), ("sql", 200), ("fake", 404)):
            assert httpx.post(url, json={"model": model, "prompt": "x"}).status_code == status


def stream_in_thread(url: str, lines: list[str], max_tokens: int = 1000) -> threading.Thread:
    """Read a long stream into `lines`, by and by."""

    def read() -> None:
        body = {**LONG, "max_tokens": max_tokens, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=20) as response:
            lines.extend(line for line in response.iter_lines() if line)

    thread = threading.Thread(target=read)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_requests_finish(number):
    with running_server() as server:
        lines: list[str] = []
        thread = stream_in_thread(server.url, lines, max_tokens=300)
        server.wait_for_metric(RUNNING, 1)
        assert server.stop(number) == 0
        thread.join()
        assert '"finish_reason":"length"' in lines[-2]
        assert lines[-1] == "data: [DONE]"
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")
        assert "Traceback" not in server.log


@pytest.mark.parametrize("by_second_signal", [False, True])
def test_requests_that_outlast_the_grace_end_with_an_error(by_second_signal):
    grace = "30" if by_second_signal else "0.3"
    with running_server("--shutdown-grace", grace, FAKE_STEP_SECONDS="0.1") as server:
        lines: list[str] = []
        answers: list[httpx.Response] = []
        thread = stream_in_thread(server.url, lines)
        other = threading.Thread(
            target=lambda: answers.append(
                httpx.post(f"{server.url}/v1/completions", json=LONG, timeout=20)
            )
        )
        other.start()
        server.wait_for_metric(RUNNING, 2)
        if by_second_signal:
            server.process.send_signal(signal.SIGINT)
            time.sleep(0.3)
        assert server.stop(timeout=5) == 0
        thread.join()
        other.join()
        assert '"error"' in lines[-2]
        assert "shut down" in lines[-2]
        assert lines[-1] == "data: [DONE]"
        assert answers[0].status_code == 503
        assert "Traceback" not in server.log


def wait_for_health(url: str, status: int, path: str = "/health", timeout: float = 20.0) -> None:
    deadline = time.monotonic() + timeout
    while httpx.get(f"{url}{path}").status_code != status:
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("prompt", ["crash", "die"])
def test_a_dead_engine_is_an_error_for_everyone_and_starts_again(prompt):
    with running_server() as server:
        lines: list[str] = []
        thread = stream_in_thread(server.url, lines)
        server.wait_for_metric(RUNNING, 1)
        url = f"{server.url}/v1/completions"
        response = httpx.post(url, json={"model": "fake", "prompt": prompt}, timeout=3)
        assert response.status_code == 503
        error = response.json()["error"]
        assert (error["type"], error["code"]) == ("server_error", "engine_dead")
        # It is not back yet.
        assert httpx.get(f"{server.url}/health").status_code == 503
        assert httpx.get(f"{server.url}/ready").status_code == 503
        assert httpx.get(f"{server.url}/live").status_code == 200
        metrics = httpx.get(f"{server.url}/metrics")
        assert metrics.status_code == 200
        assert "loraplex_requests_total" in metrics.text
        thread.join(3)
        assert '"engine_dead"' in lines[-2]
        assert lines[-1] == "data: [DONE]"
        wait_for_health(server.url, 200)
        assert httpx.get(f"{server.url}/ready").status_code == 200
        assert server.metric("loraplex_engine_restarts_total") == 1
        again = httpx.post(url, json={"model": "fake", "prompt": "hello"})
        assert again.json()["choices"][0]["text"] == "hello"
        assert server.stop() == 0


def test_a_killed_engine_under_load(adapter_root):
    """Everybody gets an answer or an error within 2 seconds, and nothing of the dead is left."""
    num_clients = 40
    ends: list[tuple[float, str]] = []

    def read(number: int) -> None:
        body = {**LONG, "model": ["fake", "sql"][number % 2], "stream": number % 4 != 0}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=20) as answer:
            text = answer.read().decode()
        ends.append((time.monotonic(), text))

    flags = ("--lora-modules", f"sql={adapter_root}/sql")
    with running_server(*flags, FAKE_STEP_SECONDS="0.05") as server:
        threads = [threading.Thread(target=read, args=(i,)) for i in range(num_clients)]
        for thread in threads:
            thread.start()
        server.wait_for_metric(RUNNING, num_clients)
        (engine,) = [
            p for p in server.descendants() if "run_engine_process" in " ".join(p.cmdline())
        ]
        killed = time.monotonic()
        engine.kill()
        for thread in threads:
            thread.join()
        assert max(end for end, _ in ends) - killed < 2
        assert all('"engine_dead"' in text for _, text in ends)
        assert all("signal 9" in text for _, text in ends)
        wait_for_health(server.url, 200)
        response = httpx.post(
            f"{server.url}/v1/completions", json={"model": "sql", "prompt": "hello"}
        )
        assert response.json()["choices"][0]["text"] == "hello"
        assert len(list(server.socket_root.iterdir())) == 1
        server.wait_for_metric(RUNNING, 0)
        assert server.stop() == 0


def test_an_engine_that_can_not_start_again_ends_the_server(tmp_path):
    with running_server("--core", "make_core_once", FAKE_MARKER=str(tmp_path / "marker")) as server:
        body = {"model": "fake", "prompt": "die"}
        assert httpx.post(f"{server.url}/v1/completions", json=body).status_code == 503
        assert server.process.wait(60) == 1
        assert "could not be started again, 3 times" in server.log


def test_the_engine_ends_with_a_server_that_is_killed():
    with running_server() as server:
        descendants = server.descendants()
        server.process.kill()
        wait_until_gone(descendants)


def test_a_signal_while_the_model_loads_ends_the_server(tmp_path):
    process = popen_server("--core", "never_start", directory=tmp_path)
    deadline = time.monotonic() + 10
    while not any((tmp_path / "sockets").iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 0
    assert list((tmp_path / "sockets").iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lora-modules", "x=/nowhere"], "adapter_config.json"),
        (["--core", "refuse_config"], "pool_bytes=1 is not allowed: it must be more"),
        (["--host", "256.0.0.1"], "host='256.0.0.1'"),
    ],
)
def test_a_wrong_setting_ends_the_start(flags, words):
    done = subprocess.run(
        [sys.executable, str(FAKE_SERVER), "--port", "0", *flags],
        capture_output=True,
        text=True,
        timeout=20,
        env=os.environ,
    )
    assert done.returncode != 0
    assert words in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].partition(": ")[0].endswith("Error")


def test_a_taken_port_is_told_before_the_model_loads():
    with socket.create_server(("127.0.0.1", 0)) as other:
        flags = ["--port", str(other.getsockname()[1]), "--core", "never_start"]
        done = subprocess.run(
            [sys.executable, str(FAKE_SERVER), *flags], capture_output=True, text=True, timeout=20
        )
    assert "in use" in done.stderr.splitlines()[-1]
