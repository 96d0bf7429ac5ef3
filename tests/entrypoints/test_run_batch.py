"""`loraplex run-batch` around a fake core: the lines that go in, and those that come out."""

from __future__ import annotations

import io
import json

import pytest
from fakes import ByteTokenizer

from loraplex.engine.async_engine import AsyncEngine
from loraplex.engine.config import EngineConfig
from loraplex.entrypoints.cli import main
from loraplex.entrypoints.http.server_config import ServerConfig
from loraplex.entrypoints.run_batch import answer_batch, read_batch

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def line(custom_id: str, url: str, **body) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})


async def test_every_request_has_its_line(tmp_path, adapter_root):
    file = tmp_path / "in.jsonl"
    messages = [{"role": "user", "content": "hi"}]
    lines = [
        line("chat", CHAT, model="fake", messages=messages),
        line("text", TEXT, model="sql", prompt="hello"),
        "",
        line("wrong", TEXT, model="fake", prompt="hello", temperature=-1),
        line("nobody", TEXT, model="nobody", prompt="hello"),
    ]
    file.write_text("\n".join(lines))
    engine = AsyncEngine(EngineConfig(), "fake_core:make_core", ByteTokenizer())
    config = ServerConfig(lora_modules=[f"sql={adapter_root / 'sql'}"])
    output = io.StringIO()
    await answer_batch(engine, config, read_batch(str(file)), output)
    answers = {(a := json.loads(text))["custom_id"]: a for text in output.getvalue().splitlines()}
    assert answers.keys() == {"chat", "text", "wrong", "nobody"}
    assert len({answer["id"] for answer in answers.values()}) == 4
    chat, text = (answers[name]["response"] for name in ("chat", "text"))
    assert chat["status_code"] == text["status_code"] == 200
    assert chat["body"]["choices"][0]["message"]["content"] == "user: hiassistant: "
    assert text["body"]["choices"][0]["text"] == "hello"
    assert answers["text"]["error"] is None
    assert answers["wrong"]["response"]["status_code"] == 400
    assert answers["wrong"]["error"]["param"] == "temperature"
    assert answers["nobody"]["response"]["status_code"] == 404
    assert engine.errored


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1 of"),
        ("[]", "no JSON object"),
        (line("a", TEXT) + "\n" + line("a", TEXT), "line 2 of"),
        (line("a", "/v1/audio"), "url='/v1/audio' must be one of"),
        (line("a", TEXT, stream=True), "without stream=true"),
        (json.dumps({"custom_id": "a", "method": "GET", "url": TEXT, "body": {}}), "'GET'"),
    ],
)
def test_what_is_no_batch_is_told_before_a_model_is_loaded(tmp_path, capsys, text, message):
    file = tmp_path / "in.jsonl"
    file.write_text(text)
    assert main(["run-batch", "-i", str(file), "-o", str(tmp_path / "out.jsonl")]) == 2
    assert message in capsys.readouterr().err


def test_files_that_are_not_there(tmp_path, capsys):
    assert main(["run-batch", "-i", str(tmp_path / "no"), "-o", "-"]) == 2
    assert "can't be read" in capsys.readouterr().err
