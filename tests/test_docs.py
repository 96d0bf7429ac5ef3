"""What the documents say is so: every block of theirs is run, or what it names is looked for."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack, chdir
from pathlib import Path
from typing import Any

import httpx
import pytest
from fakes import ByteTokenizer, FakeCore
from helm_chart import render_chart
from real_server import serving
from server_process import running_server

import loraplex
from loraplex.engine.config import EngineConfig
from loraplex.engine.llm import LLM
from loraplex.entrypoints import cli
from loraplex.entrypoints.http.api_keys import read_key_file
from loraplex.entrypoints.serve import add_serve_arguments

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", "examples/README.md"]
DOCUMENTS += [str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").glob("*.md"))]
# With what is not on this machine.
NEEDING_A_HUB = {"docs/adapters.md"}
ADAPTERS = {name: f"examples/adapters/{name}" for name in ("pirate", "haiku")}
# A picture is run by nobody.
LANGUAGES = {"python", "sh", "toml", "mermaid"}


def all_blocks(document: str) -> list[tuple[str, str]]:
    """The language and the text of each block."""
    text = (ROOT / document).read_text()
    return re.findall(r"^```([^\n]*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def blocks(document: str, language: str) -> list[str]:
    return [text for name, text in all_blocks(document) if name == language]


def commands(document: str) -> Iterator[list[str]]:
    """The words of each command in the document's shell blocks, without comments."""
    for block in blocks(document, "sh"):
        text = ""
        for line in block.replace("\\\n", " ").splitlines():
            text += line
            try:
                words = shlex.split(text, comments=True)
            except ValueError:
                text += "\n"  # within quotes
                continue
            if words:
                yield words
            text = ""


def commands_of(program: str) -> list[list[str]]:
    return [words for document in DOCUMENTS for words in commands(document) if words[0] == program]


def serve_flags() -> set[str]:
    parser = argparse.ArgumentParser()
    add_serve_arguments(parser)
    return set(parser._option_string_actions)


def test_every_block_is_of_a_kind_that_is_run():
    languages = {name for document in DOCUMENTS for name, _ in all_blocks(document)}
    assert languages <= LANGUAGES, "what runs the new ones?"
    programs = {words[0] for document in DOCUMENTS for words in commands(document)}
    assert programs <= {"curl", "docker", "helm", "loraplex", "make", "python"}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    text = (ROOT / document).read_text()
    targets = re.findall(r"\]\(([^)#\s]+)", text)
    for target in targets:
        if "://" not in target:
            assert ((ROOT / document).parent / target).exists(), target


class Parsed(BaseException):
    """A command line was taken; what it asks for is not done."""


@pytest.mark.parametrize("words", commands_of("loraplex"), ids=" ".join)
def test_command_lines_are_taken(words, monkeypatch):
    parse_args = argparse.ArgumentParser.parse_args

    def parse(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> argparse.Namespace:
        arguments = parse_args(self, *args, **kwargs)
        if self.prog == "loraplex" and words[1] == "bench":
            return arguments  # The benchmark parses its flags itself.
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.chdir(ROOT)
    with pytest.raises(Parsed):
        cli.main(words[1:])


def test_what_other_commands_name_exists():
    makefile, dockerfile = ((ROOT / name).read_text() for name in ("Makefile", "Dockerfile"))
    for words in commands_of("make"):
        assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), words
    for words in commands_of("python"):
        compile((ROOT / words[1]).read_text(), words[1], "exec")
    for words in commands_of("docker"):
        if words[1] == "build":
            assert f" AS {words[words.index('--target') + 1]}\n" in dockerfile
    built = {w[w.index("-t") + 1] for w in commands_of("docker") if w[1] == "build"}
    run = [words for words in commands_of("docker") if words[1] == "run"]
    assert run and all(built & set(words) for words in run)
    for words in commands_of("helm"):
        settings = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
        (container,) = (
            manifest["spec"]["template"]["spec"]["containers"][0]
            for manifest in render_chart(ROOT / words[3], settings)
            if manifest["kind"] == "Deployment"
        )
        parser = argparse.ArgumentParser(exit_on_error=False)
        add_serve_arguments(parser)
        assert parser.parse_args(container["args"]).model == "Qwen/Qwen3-8B"


def test_flags_in_tables_exist():
    flags = serve_flags()
    operations = (ROOT / "docs/operations.md").read_text()
    named = set(re.findall(r"`(--[a-z-]+)", operations))
    assert len(named) > 10
    assert named <= flags | {"--target"}
    rows = re.findall(
        r"^\| .*? \| (.*) \|$", (ROOT / "docs/migrating.md").read_text(), re.MULTILINE
    )
    named = {flag for row in rows for flag in re.findall(r"(--[a-z-]+)", row)}
    assert len(named) > 8
    assert named <= flags


def test_the_examples_of_key_files(tmp_path):
    texts = [text for document in DOCUMENTS for text in blocks(document, "toml")]
    assert len(texts) >= 2
    for text in texts:
        assert tomllib.loads(text).keys() == {"keys"}
        path = tmp_path / "keys.toml"
        path.write_text(text)
        assert read_key_file(path)


class FakeLLM(LLM):
    """Takes the options of an LLM, and echoes."""

    def __init__(self, model: str = EngineConfig.model, **options: Any) -> None:
        EngineConfig.from_options(model=model, **options)
        self._attach(FakeCore(), ByteTokenizer(), 0)


@pytest.fixture(scope="module")
def fake_url() -> Iterator[str]:
    """Of a server without a model, started once by each command line of the documents' own; the
    last one serves."""
    lines = [words[2:] for words in commands_of("loraplex") if words[1] == "serve"]
    assert len(lines) >= 2
    flags = ("--host", "127.0.0.1", "--port", "0", "--served-model-name", EngineConfig.model)
    with ExitStack() as stack:
        stack.enter_context(chdir(ROOT))
        for line in lines:
            # Its chat template is a fake, too, and has nothing to do with reasoning.
            server = stack.enter_context(
                running_server(*line[1:], *flags, "--reasoning-parser", "none")
            )
        yield server.url


@pytest.mark.parametrize("document", DOCUMENTS)
def test_examples_run(document, fake_url, monkeypatch, capsys):
    """With everything but the model: Python as it stands, and what curl asks for."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(loraplex, "LLM", FakeLLM, raising=False)
    for block in blocks(document, "python"):
        exec(compile(block.replace("http://localhost:8000", fake_url), document, "exec"), {})
        assert bool(capsys.readouterr().out.strip()) == ("print(" in block)
    check_curl(document, fake_url)


@pytest.mark.slow
def test_examples_run_with_a_model():
    with serving({name: str(ROOT / path) for name, path in ADAPTERS.items()}) as url:
        for document in DOCUMENTS:
            check_curl(document, url)
            for block in blocks(document, "python"):
                if document not in NEEDING_A_HUB:
                    run_python(block.replace("http://localhost:8000", url))


def run_python(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=os.environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert bool(done.stdout.strip()) == ("print(" in code)


def check_curl(document: str, url: str) -> None:
    for words in commands(document):
        if words[0] == "curl":
            answer = run_curl(words, url)
            assert answer.status_code == 200, (words, answer.text)
            assert answer.text
            if "grep" in words:
                assert re.search(words[words.index("-E") + 1], answer.text, re.MULTILINE), words


def run_curl(words: list[str], url: str) -> httpx.Response:
    """What curl would get: an address, and perhaps a body."""
    words = words[: words.index("|")] if "|" in words else words
    address = next(word for word in words if word.startswith("localhost:8000"))
    target = address.replace("localhost:8000", url)
    if "-d" not in words:
        return httpx.get(target)
    body = words[words.index("-d") + 1]
    headers = {"content-type": "application/json"}
    return httpx.post(target, content=body, headers=headers, timeout=120)
