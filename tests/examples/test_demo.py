"""The demo: its questions, the wave over HTTP (against a stand-in server) and what it prints."""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from rich.console import Console

from loraplex.entrypoints import demo
from loraplex.entrypoints.demo import Question, Reply, Wave

METRICS = """# HELP loraplex_pages Pages of the pool by state
# TYPE loraplex_pages gauge
loraplex_pages{state="free"} 200.0
loraplex_pages{state="kv"} 12.0
loraplex_pages{state="kv_cached"} 3.0
loraplex_pages{state="adapter"} 30.0
loraplex_pages{state="adapter_idle"} 11.0
loraplex_requests_running 4.0
"""


def events(*pieces: str, finish_reason: str | None = "stop") -> str:
    chunks: list[dict] = [
        {"choices": [{"delta": {"content": piece}, "finish_reason": None}]} for piece in pieces
    ]
    chunks.append({"choices": [{"delta": {}, "finish_reason": finish_reason}]})
    chunks.append({"choices": [], "usage": {"completion_tokens": len(pieces)}})
    return "".join(f"data: {json.dumps(c)}\n\n" for c in chunks) + "data: [DONE]\n\n"


def serve(request: httpx.Request) -> httpx.Response:
    """What the stand-in server answers."""
    if request.url.path == "/metrics":
        return httpx.Response(200, text=METRICS)
    body = json.loads(request.content)
    assert body["stream"] is True
    assert body["temperature"] == 0
    match body["model"]:
        case "broken":
            return httpx.Response(404, json={"error": {"message": "no such adapter"}})
        case "cut":
            return httpx.Response(200, text=events("Half a", finish_reason=None))
        case "failing":
            text = f"data: {json.dumps({'error': {'message': 'out of luck'}})}\n\n"
            return httpx.Response(200, text=text)
        case model:
            return httpx.Response(200, text=events(f"I am {model}", " — ", "🏴\u200d☠️"))


def send(models: list[str]) -> Wave:
    async def run() -> Wave:
        transport = httpx.MockTransport(serve)
        async with httpx.AsyncClient(base_url="http://demo", transport=transport) as client:
            return await demo.send_wave(client, [Question(model, "Hi?") for model in models])

    return asyncio.run(run())


def test_wave_collects_replies_and_pages() -> None:
    wave = send(["base", "pirate"])
    assert [reply.text for reply in wave.replies] == [
        "I am base — 🏴\u200d☠️",
        "I am pirate — 🏴\u200d☠️",
    ]
    assert [reply.error for reply in wave.replies] == [None, None]
    assert [reply.num_tokens for reply in wave.replies] == [3, 3]
    assert all(0 < r.first_token_seconds <= r.total_seconds for r in wave.replies)
    pages = {"free": 200, "kv": 12, "kv_cached": 3, "adapter": 30, "adapter_idle": 11}
    assert wave.final_pages == wave.busiest_pages == pages


def test_wave_reports_what_failed() -> None:
    broken, cut, failing, fine = send(["broken", "cut", "failing", "base"]).replies
    assert broken.error is not None
    assert "HTTP 404" in broken.error
    assert "no such adapter" in broken.error
    assert cut.error is not None
    assert "ended early" in cut.error
    assert failing.error is not None
    assert "out of luck" in failing.error
    assert fine.error is None


def test_everyone_is_asked_the_same_and_adapters_one_more() -> None:
    prompts = {"everyone": "Why?", "adapters": {"b": "Own?", "elsewhere": "Never asked?"}}
    assert demo.make_questions("base", ["a", "b"], prompts) == [
        Question("base", "Why?"),
        Question("a", "Why?"),
        Question("b", "Why?"),
        Question("b", "Own?"),
    ]


def render(wave: Wave) -> str:
    console = Console(file=io.StringIO(), width=110, color_system=None)
    demo.print_wave(console, wave)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_rendering() -> None:
    replies = [
        Reply(Question("base", "Why?"), "[bold]Because[/bold].", 21, 0.125, 1.125),
        Reply(Question("pirate", "Why?"), "Arr!", 1, 0.25, 0.25),
        Reply(Question("pirate", "Own?"), error="HTTP 500: it sank"),
    ]
    busiest = {"free": 4, "kv": 3, "kv_cached": 0, "adapter": 2, "adapter_idle": 1}
    final = {"free": 5, "kv": 0, "kv_cached": 2, "adapter": 0, "adapter_idle": 3}
    text = render(Wave(replies, 2.0, busiest, final))
    assert "[bold]Because[/bold]." in text
    assert "125 ms" in text
    assert " 20 " in text
    assert "HTTP 500: it sank" in text
    assert "3 replies of 2 models at once: 22 tokens in 2.0 s, 11 tokens/s" in text
    assert "●●○■■■····" in text
    assert "○○○□□·····" in text
    assert "KV in use 3" in text


def test_map_of_a_large_pool_is_scaled() -> None:
    console = Console(file=io.StringIO(), width=110, color_system=None)
    demo.print_pages(console, "The pool", {"free": 100_000, "adapter": 50})
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "one sign is 98 pages" in text
    assert 1000 < text.count("·") <= 1024
    assert "adapter in use 50" in text


def test_adapters_are_found_by_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--adapters .* must be a directory"):
        demo.find_adapters(tmp_path)
    for name in ("shout", "pirate"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
    (tmp_path / "prompts.json").write_text("{}")
    assert demo.find_adapters(tmp_path) == {
        "pirate": tmp_path / "pirate",
        "shout": tmp_path / "shout",
    }


def test_server_that_does_not_start_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pirate").mkdir()
    (tmp_path / "pirate" / "adapter_config.json").write_text("{}")
    (tmp_path / "prompts.json").write_text("{}")
    parser = argparse.ArgumentParser()
    demo.add_demo_arguments(parser)
    args = parser.parse_args(["--adapters", str(tmp_path)])
    monkeypatch.setattr(demo, "serve_command", lambda *_: ["false"])
    with pytest.raises(RuntimeError, match="exit code 1"):
        demo.run_demo(args)


def test_demo_with_the_real_server() -> None:
    """The whole thing: server process, one wave to the base model and all adapters, clean stop."""
    adapters = Path(__file__).parents[2] / "examples" / "adapters"
    names = list(demo.find_adapters(adapters))
    process = subprocess.run(
        [sys.executable, "-m", "loraplex.entrypoints.cli", "demo", "--adapters", str(adapters)],
        capture_output=True,
        env={**os.environ, "COLUMNS": "140"},
        encoding="utf-8",
        timeout=300,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    for name in ["smollm2-135m-instruct", *names]:
        assert f" {name} " in process.stdout
    assert f"{2 * len(names) + 1} replies of {len(names) + 1} models at once" in process.stdout
    assert '{"topic": ' in process.stdout
    assert "adapter idle" in process.stdout
