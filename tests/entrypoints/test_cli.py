"""The command line: its help, its flags and its mistakes."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys

import pytest

from loraplex.engine.config import EngineConfig
from loraplex.entrypoints.cli import COMMANDS, main
from loraplex.entrypoints.config_arguments import parse_size
from loraplex.entrypoints.http.server_config import ServerConfig
from loraplex.entrypoints.serve import add_serve_arguments, config_from_arguments


def parse(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_serve_arguments(parser)
    return parser.parse_args(flags)


def run_cli(*arguments: str) -> subprocess.CompletedProcess:
    code = (
        "import sys\n"
        "from loraplex.entrypoints.cli import main\n"
        "try:\n"
        "    status = main()\n"
        "finally:\n"
        "    heavy = {'torch', 'transformers', 'fastapi'} & sys.modules.keys()\n"
        "    sys.stderr.write(f'heavy: {sorted(heavy)}\\n')\n"
        "sys.exit(status)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60
    )


def test_flags_of_serve_become_configs():
    arguments = parse(
        *(
            "some/model",
            "--port",
            "1",
            "--lora-modules",
            "a=/a",
            "b=/b=c",
            "--lora-modules",
            "c=/c",
        ),
        *("--pool-bytes", "1.5GiB", "--max-model-len", "128", "--no-enable-prefix-caching"),
        *("--dtype", "float32"),
    )
    server = config_from_arguments(arguments, ServerConfig)
    assert server.port == 1
    assert server.adapter_paths() == [("a", "/a"), ("b", "/b=c"), ("c", "/c")]
    assert config_from_arguments(arguments, EngineConfig) == EngineConfig(
        model="some/model", pool_bytes=3 << 29, max_model_len=128, enable_prefix_caching=False,
        dtype="float32",
    )  # fmt: skip


def test_flags_that_are_not_given_leave_the_defaults():
    arguments = parse()
    assert config_from_arguments(arguments, EngineConfig) == EngineConfig()
    assert config_from_arguments(arguments, ServerConfig) == ServerConfig()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lora_modules": ["x"]}, "lora_modules='x' is not allowed: it must be name=path"),
        ({"log_level": "loud"}, "log_level='loud' is not allowed: it must be one of debug"),
        ({"shutdown_grace": -1.0}, "shutdown_grace=-1.0 is not allowed"),
        ({"api_key": [""]}, "api_key=... is not allowed"),
        ({"pin_lora_modules": ["x"]}, "pin_lora_modules='x' is not allowed"),
        ({"allow_runtime_lora": ["/nowhere"]}, "allow_runtime_lora='/nowhere' is not allowed"),
    ],
)
def test_settings_of_the_server_that_are_refused(settings, words):
    with pytest.raises(ValueError, match="not allowed") as caught:
        ServerConfig(**settings)
    assert words in str(caught.value)


def test_the_api_key_may_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("LORAPLEX_API_KEY", "sesame")
    assert ServerConfig().api_keys() == ["sesame"]
    assert ServerConfig(api_key=["mine", "yours"]).api_keys() == ["mine", "yours"]
    monkeypatch.setenv("LORAPLEX_API_KEY", "")
    assert ServerConfig().api_keys() == []


@pytest.mark.parametrize(
    ("text", "size"),
    [("1000", 1000), ("2K", 2048), ("3MiB", 3 << 20), ("1.5g", 3 << 29), ("1TB", 1 << 40)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1", "1X", "1.G"])
def test_sizes_that_are_none(text):
    with pytest.raises(argparse.ArgumentTypeError):
        parse_size(text)


def test_help_names_every_command():
    done = run_cli("--help")
    assert done.returncode == 0
    for name in COMMANDS:
        assert re.search(rf"\n    {name}\s", done.stdout)
    assert done.stderr == "heavy: []\n"


@pytest.mark.parametrize("command", [["serve"], ["generate"], ["adapters", "inspect"]])
def test_help_of_a_command_is_quick(command):
    done = run_cli(*command, "--help")
    assert done.returncode == 0
    assert "\nheavy: []\n" in f"\n{done.stderr}"


def test_every_setting_of_the_engine_is_explained():
    text = run_cli("serve", "--help").stdout
    assert "--max-num-batched-tokens" in text
    assert "Most tokens computed in one step. (default: 2048)" in text
    assert "(default: 4G)" in text


def test_version():
    assert run_cli("--version").stdout == "loraplex 0.1.0\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve", "--port", "99999"], "port=99999 is not allowed"),
        (["serve", "--dtype", "float8"], "dtype='float8' is not allowed"),
        (
            ["serve", "--kv-cache-dtype", "fp4"],
            "kv_cache_dtype='fp4' is not allowed: it must be one of 'auto', 'fp8'",
        ),
        (["generate", "--prompt", "x", "--temperature", "-1"], "temperature=-1.0 is not allowed"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, words):
    done = run_cli(*arguments)
    assert done.returncode == 2
    line, heavy, *rest = done.stderr.splitlines()
    assert line.startswith("loraplex: ")
    assert words in line
    assert (heavy, rest) == ("heavy: []", [])


def test_an_unknown_flag_is_argparse_s_mistake(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["serve", "--max-loras", "4"])
    assert caught.value.code == 2
    assert "--max-loras" in capsys.readouterr().err
