"""What the documents and the files for deployment say is so."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from real_server import serving

from loraplex.entrypoints.cli import COMMANDS
from loraplex.entrypoints.http.api_keys import read_key_file
from loraplex.entrypoints.serve import add_serve_arguments

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "docs/operations.md", "docs/migrating.md")
ADAPTERS = {name: f"examples/adapters/{name}" for name in ("pirate", "haiku")}


def blocks(document: str, language: str) -> list[str]:
    text = (ROOT / document).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


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


def serve_flags() -> set[str]:
    parser = argparse.ArgumentParser()
    add_serve_arguments(parser)
    return set(parser._option_string_actions)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_have_flags_that_exist(document):
    seen = 0
    for words in commands(document):
        if words[0] == "loraplex" and words[1] == "serve":
            parser = argparse.ArgumentParser(exit_on_error=False)
            add_serve_arguments(parser)
            parser.parse_args(words[2:])
            seen += 1
        elif words[0] == "loraplex" and not words[1].startswith("-"):
            assert words[1] in COMMANDS
            seen += 1
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert seen or document == "docs/migrating.md"


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


def test_the_example_of_a_key_file(tmp_path):
    for document in ("README.md", "docs/operations.md"):
        for block in blocks(document, "toml"):
            path = tmp_path / "keys.toml"
            path.write_text(block)
            assert read_key_file(path)


def test_files_for_deployment_name_what_exists():
    flags = serve_flags()
    dockerfile = (ROOT / "Dockerfile").read_text()
    entrypoints = re.findall(r"^ENTRYPOINT (.*)$", dockerfile, re.MULTILINE)
    assert len(entrypoints) == 2
    assert {f for text in entrypoints for f in re.findall(r"--[a-z-]+", text)} <= flags
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    command = compose["services"]["loraplex"]["command"]
    assert {word for word in command if word.startswith("--")} <= flags
    assert compose["services"]["loraplex"]["build"]["target"] == "cpu"
    assert "AS cpu\n" in dockerfile
    for service in compose["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in compose["volumes"] or (ROOT / source).exists(), source
    port = command[command.index("--admin-port") + 1]
    scrape = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    assert scrape["scrape_configs"][0]["static_configs"][0]["targets"] == [f"loraplex:{port}"]


def test_the_chart_uses_values_and_flags_that_exist():
    chart = ROOT / "deploy/helm/loraplex"
    values = yaml.safe_load((chart / "values.yaml").read_text())
    for path in (chart / "templates").iterdir():
        text = path.read_text()
        for name in re.findall(r"\.Values((?:\.\w+)+)", text):
            value = values
            for part in name[1:].split("."):
                value = value[part]
        assert len(re.findall(r"\{\{- (?:if|range)", text)) == text.count("{{- end }}")
        # Without what the template language does, it is YAML.
        plain = re.sub(r"^\s*\{\{-.*\}\}\n", "", text, flags=re.MULTILINE)
        plain = re.sub(r"^\s*\{\{- toYaml.*$", "", plain, flags=re.MULTILINE)
        list(yaml.safe_load_all(re.sub(r"\{\{.*?\}\}", "1", plain)))
    text = (chart / "templates/deployment.yaml").read_text()
    assert set(re.findall(r"- (--[a-z-]+)", text)) <= serve_flags()
    assert {"/live", "/health", "/ready"} <= set(re.findall(r"path: (\S+)", text))


@pytest.mark.slow
def test_examples_run_against_a_real_server():
    """Python as it stands, and what curl asks for. Each must print something."""
    with serving({name: str(ROOT / path) for name, path in ADAPTERS.items()}) as url:
        for document in DOCUMENTS:
            for block in blocks(document, "python"):
                code = block.replace("http://localhost:8000", url)
                done = subprocess.run(
                    [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                    timeout=300, env=os.environ,
                )  # fmt: skip
                assert done.returncode == 0, done.stderr
                assert done.stdout.strip()
            for words in commands(document):
                if words[0] == "curl":
                    answer = run_curl(words, url)
                    assert answer.status_code == 200, (words, answer.text)
                    assert answer.text


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
