"""Who may call and how much: keys, their limits, and bodies and clients that are too much."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import time

import httpx
import openai
import pytest
from server_process import ServerProcess, running_server

from loraplex.entrypoints.http.api_keys import Budget, KeyRing

KEY_FILE = """
[[keys]]
name = "open"
key = "sesame"
admin = true

[[keys]]
name = "narrow"
key_sha256 = "{digest}"
adapters = ["sql", "team-?"]

[[keys]]
name = "seldom"
key = "seldom-key"
requests_per_minute = 2

[[keys]]
name = "short"
key = "short-key"
tokens_per_minute = 20

[[keys]]
name = "single"
key = "single-key"
max_concurrent_requests = 1
""".format(digest=hashlib.sha256(b"narrow-key").hexdigest())
RUNNING = "loraplex_num_requests_running"


@pytest.fixture(scope="module")
def guarded(adapter_root, tmp_path_factory):
    """A server with keys, and their file."""
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    path.write_text(KEY_FILE)
    modules = [f"{name}={adapter_root / name}" for name in ("sql", "poet")]
    flags = ["--api-key-file", str(path), "--api-key", "from-a-flag", "--lora-modules", *modules]
    limits = ["--max-request-bytes", "100K", "--max-output-tokens", "500", "--max-stop-sequences",
              "2", "--max-completions", "3", "--client-timeout", "1"]  # fmt: skip
    with running_server(*flags, *limits, FAKE_STEP_SECONDS="0.004") as server:
        yield server, path
        log = server.log
        assert "Traceback" not in log
        for secret in ("sesame", "narrow-key", "seldom-key", "from-a-flag", "sk-wrong"):
            assert secret not in log


def complete(server: ServerProcess, key: str | None = "sesame", **body) -> httpx.Response:
    return httpx.post(
        f"{server.url}/v1/completions",
        headers={} if key is None else {"authorization": f"Bearer {key}"},
        json={"model": "fake", "prompt": "hello", **body},
        timeout=20,
    )


def test_nobody_comes_in_without_a_key(guarded):
    server, _ = guarded
    for path in ("/v1/models", "/v1/x", "/info", "/docs", "/openapi.json", "/nowhere"):
        for value in ("", "Bearer sk-wrong", "sesame", "Basic sesame", "Bearer"):
            response = httpx.get(f"{server.url}{path}", headers={"authorization": value})
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
    assert complete(server, None).json()["error"]["code"] == "invalid_api_key"
    response = httpx.post(f"{server.url}/generate", json={"inputs": "x"})
    assert (response.status_code, response.json()["error_type"]) == (401, "invalid_api_key")
    assert httpx.post(f"{server.url}/", json={"inputs": "x"}).status_code == 401
    for path in ("/", "/health", "/ping", "/metrics", "/version"):
        assert httpx.get(f"{server.url}{path}").status_code == 200


def test_every_key_comes_in(guarded):
    server, _ = guarded
    for key in ("sesame", "from-a-flag", "narrow-key"):
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key) as client:
            assert client.models.list().data[0].id == "fake"
        assert complete(server, key).status_code == 200


def test_a_key_is_for_its_adapters(guarded):
    server, _ = guarded
    assert complete(server, "narrow-key", model="sql").status_code == 200
    assert complete(server, "sesame", model="poet").status_code == 200
    headers = {"authorization": "Bearer narrow-key"}
    cards = httpx.get(f"{server.url}/v1/models", headers=headers).json()["data"]
    assert [card["id"] for card in cards] == ["fake", "sql"]
    for name, status in (("fake", 200), ("sql", 200), ("poet", 404)):
        url = f"{server.url}/v1/models/{name}"
        assert httpx.get(url, headers=headers).status_code == status
    adapters = httpx.get(f"{server.url}/v1/lora_adapters", headers=headers).json()["data"]
    assert [adapter["lora_name"] for adapter in adapters] == ["sql"]
    for stream in (False, True):
        response = complete(server, "narrow-key", model="poet", stream=stream)
        assert response.status_code == 403
        assert response.json()["error"]["code"] == "adapter_not_allowed"


def test_only_admins_change_adapters(guarded):
    server, _ = guarded
    for key, words in (("narrow-key", "not for /v1/unload_lora_adapter"), ("sesame", "--allow")):
        response = httpx.post(
            f"{server.url}/v1/unload_lora_adapter",
            json={"lora_name": "sql"},
            headers={"authorization": f"Bearer {key}"},
        )
        assert response.status_code == 403
        assert words in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("key", "field", "wait"),
    [("seldom-key", "requests_per_minute", 30), ("short-key", "tokens_per_minute", 30)],
)
def test_a_key_that_has_spent_its_minute_waits(guarded, key, field, wait):
    server, _ = guarded
    statuses = [complete(server, key).status_code for _ in range(3)]
    assert statuses[0] == 200
    response = complete(server, key)
    assert response.status_code == 429
    assert field in response.json()["error"]["message"]
    assert 1 <= int(response.headers["retry-after"]) <= wait


def test_a_key_with_one_request_at_a_time(guarded):
    server, _ = guarded
    url, headers = f"{server.url}/v1/completions", {"authorization": "Bearer single-key"}
    body = {"model": "fake", "prompt": "long", "stream": True, "max_tokens": 500}
    with httpx.stream("POST", url, json=body, headers=headers) as response:
        lines = response.iter_lines()
        next(lines)
        refused = complete(server, "single-key")
        assert refused.status_code == 429
        assert "max_concurrent_requests=1" in refused.json()["error"]["message"]
    server.wait_for_metric(RUNNING, 0)
    assert complete(server, "single-key").status_code == 200


def test_the_key_file_is_read_again(guarded):
    server, path = guarded
    assert complete(server, "new-key").status_code == 401
    path.write_text(KEY_FILE + '\n[[keys]]\nname = "new"\nkey = "new-key"\n')
    wait_for(lambda: complete(server, "new-key").status_code == 200)
    # What the others have used up stays used up.
    assert complete(server, "seldom-key").status_code in (200, 429)
    path.write_text("[[keys]]\nname = 5\n")
    wait_for(lambda: "stay as they were" in server.log or not complete(server, "sesame"))
    assert complete(server, "new-key").status_code == 200
    path.write_text(KEY_FILE)
    wait_for(lambda: complete(server, "new-key").status_code == 401)


def wait_for(is_so, timeout: float = 10.0) -> None:
    deadline = time.monotonic() + timeout
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "keys"),
        ('[[keys]]\nname = "a"', "'a'"),
        ('[[keys]]\nname = "a"\nkey = "x"\nkey_sha256 = "x"', "'a'"),
        ('[[keys]]\nname = "a"\nkey = "x"\nrequests_per_minute = 0', "requests_per_minute"),
        ('[[keys]]\nname = "a"\nkey = "x"\nrequests = 1', "requests"),
        ('[[keys]]\nname = "a"\nkey = "x"\n[[keys]]\nname = "b"\nkey = "x"', "twice"),
        ("[[keys]", "api_key_file"),
    ],
)
def test_a_wrong_key_file_is_refused_without_showing_a_key(tmp_path, text, word):
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=word):
        KeyRing([], path)
    with pytest.raises(ValueError, match="api_key_file"):
        KeyRing([], tmp_path / "nowhere")


def test_a_budget_may_be_overdrawn_and_is_saved_for_a_minute_only(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    budget = Budget(60)
    now += 600
    assert budget.wait(60) == 0
    assert budget.wait(61) == 1
    budget.spend(90)
    assert budget.wait(1) == 31
    now += 31
    assert budget.wait(1) == 0
    assert Budget(None).wait(1e9) == 0


def test_requests_that_are_too_much(guarded):
    server, _ = guarded
    too_long = complete(server, prompt="x" * 200_000)
    assert too_long.status_code == 413
    assert "102400" in too_long.json()["error"]["message"]
    pieces = (b"x" * 1000 for _ in range(200))
    headers = {"authorization": "Bearer sesame"}
    response = httpx.post(f"{server.url}/v1/completions", content=pieces, headers=headers)
    assert response.status_code == 413
    for body, word in [
        ({"max_tokens": 501}, "max_tokens"),
        ({"stop": ["a", "b", "c"]}, "stop"),
        ({"n": 4}, "n=4"),
        ({"prompt": ["a", "b"], "n": 2}, "n=2"),
    ]:
        response = complete(server, **body)
        assert response.status_code == 400
        assert word in response.json()["error"]["message"]
    assert complete(server, n=3).status_code == 200
    body = {"inputs": "long", "parameters": {"details": True}}
    response = httpx.post(f"{server.url}/generate", json=body, headers=headers, timeout=20)
    assert response.json()["details"]["generated_tokens"] == 500


def test_a_client_that_reads_nothing_is_dropped():
    with running_server("--client-timeout", "0.5", FAKE_STEP_SECONDS="0.002") as server:
        host, port = server.url.removeprefix("http://").split(":")
        body = json.dumps({"model": "fake", "prompt": "long", "max_tokens": 1000, "n": 32,
                           "stream": True}).encode()  # fmt: skip
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            client.connect((host, int(port)))
            client.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            aborted = 'loraplex_request_success_total{finished_reason="abort"}'
            server.wait_for_metric(aborted, 32, timeout=20)
            assert server.metric(RUNNING) == 0


def test_a_request_that_takes_too_long_fails():
    with running_server("--request-timeout", "0.3", FAKE_STEP_SECONDS="0.02") as server:
        response = complete(server, None, prompt="long", max_tokens=1000)
        assert response.status_code == 504
        assert "within 0.3 seconds" in response.json()["error"]["message"]
        lines = complete(server, None, prompt="long", max_tokens=1000, stream=True).text.split("\n")
        assert "within 0.3 seconds" in lines[-5]
        server.wait_for_metric(RUNNING, 0)
        assert complete(server, None).status_code == 200


def test_a_full_queue_is_a_429_that_says_when_to_come_back():
    flags = ("--max-num-waiting", "2", "--max-num-seqs", "1")
    server_flags = ("--core", "make_scheduled_core", *flags)
    with running_server(*server_flags, FAKE_STEP_SECONDS="0.01") as server:
        answers: list[httpx.Response] = []

        def ask() -> None:
            answers.append(complete(server, None, prompt=[1, 2, 3], max_tokens=60))

        threads = [threading.Thread(target=ask) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        refused = [a for a in answers if a.status_code == 429]
        assert refused
        assert all(int(a.headers["retry-after"]) >= 1 for a in refused)
        assert all(a.json()["error"]["type"] == "rate_limit_error" for a in refused)
        assert {a.status_code for a in answers} == {200, 429}


def test_the_access_log(server):
    before = len(server.log)
    headers = {"x-request-id": "mine-1"}
    body = {"inputs": "secret text", "parameters": {"adapter_id": "sql", "api_token": "hf_token"}}
    response = httpx.post(f"{server.url}/generate", json=body, headers=headers)
    assert response.headers["x-request-id"] == "mine-1"
    wait_for(lambda: "mine-1" in server.log[before:])
    log = server.log[before:]
    assert "secret text" not in log and "hf_token" not in log
    entry = json.loads(next(line for line in log.splitlines() if "mine-1" in line))
    assert entry.pop("seconds") < 10
    assert entry.pop("time").startswith("20")
    assert entry == {
        "request_id": "mine-1", "client": "127.0.0.1", "key": None, "method": "POST",
        "path": "/generate", "status": 200, "complete": True, "adapters": ["sql"],
        "prompt_tokens": 12, "output_tokens": 12,
    }  # fmt: skip
    generated = httpx.get(f"{server.url}/health").headers["x-request-id"]
    assert len(generated) == 32
    forged = httpx.get(f"{server.url}/health", headers={"x-request-id": "x" * 200})
    assert len(forged.headers["x-request-id"]) == 32


def test_scripts_of_other_pages_are_let_in_by_name_only(server):
    headers = {"origin": "https://app.example", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in httpx.get(f"{server.url}/version").headers
    with running_server("--cors-origins", "https://app.example", "--api-key", "k") as open_server:
        url = f"{open_server.url}/v1/completions"
        asked = httpx.options(url, headers=headers)
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == "https://app.example"
        other = httpx.options(url, headers={**headers, "origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers
