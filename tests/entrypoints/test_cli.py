"""The command line: its help, its flags and its mistakes."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from loraplex.engine.config import EngineConfig
from loraplex.entrypoints.cli import COMMANDS, main
from loraplex.entrypoints.command_parser import OTHERS_FLAGS
from loraplex.entrypoints.config_arguments import (
    config_from_arguments,
    engine_config_from_arguments,
    parse_size,
)
from loraplex.entrypoints.http.server_config import ServerConfig
from loraplex.entrypoints.serve import add_serve_arguments


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
    assert engine_config_from_arguments(arguments) == EngineConfig(
        model="some/model", pool_bytes=3 << 29, max_model_len=128, enable_prefix_caching=False,
        dtype="float32",
    )  # fmt: skip


def test_flags_that_are_not_given_leave_the_defaults():
    arguments = parse()
    assert engine_config_from_arguments(arguments) == EngineConfig()
    assert config_from_arguments(arguments, ServerConfig) == ServerConfig()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lora_modules": ["x"]}, "lora_modules='x' is not allowed: it must be name=path"),
        (
            {"lora_modules": ["x=a", "y=a", "x=b"]},
            "lora_modules='x' is not allowed: it must be a",
        ),
        ({"port": "80"}, "port='80' is not allowed: it must be an integer"),
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


def inspect_into(output) -> tuple[int, str]:
    adapter = Path(__file__).parents[2] / "examples" / "adapters" / "pirate"
    command = [sys.executable, "-m", "loraplex.entrypoints.cli", "adapters", "inspect", adapter]
    done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True, timeout=60)
    return done.returncode, done.stderr


def test_a_full_disk_and_a_reader_that_had_enough_are_no_tracebacks():
    with open("/dev/full", "w") as full:
        assert inspect_into(full) == (1, "loraplex: [Errno 28] No space left on device\n")
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end) as pipe:
        assert inspect_into(pipe) == (1, "")


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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve", "--portt", "1"], "--portt is not a flag: did you mean --port?"),
        (["serve", "--model-id", "x"], "--model-id is not a flag: the model is named without"),
        (["serve", "--quantize=awq"], "--quantize is not a flag: --quantization"),
        (["serve", "--colour", "red"], "--colour is not a flag"),
        (["serve", "--max-model-len", "4x"], "--max-model-len: invalid int value: '4x'"),
        (["generate", "hi"], "'hi' is not understood"),
        (["adapters", "inspect", "--modell", "a", "b"], "did you mean --model?"),
        (["run-batch"], "required: -i/--input-file, -o/--output-file"),
        (["sreve"], "invalid choice: 'sreve'"),
        ([], "required: COMMAND"),
    ],
)
def test_a_mistake_in_the_flags_is_not_buried_under_all_of_them(arguments, words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    mistake, hint = capsys.readouterr().err.splitlines()
    assert mistake.startswith("loraplex")
    assert words in mistake
    assert hint.endswith("--help` says what there is")


def test_every_flag_that_is_hinted_at_is_one():
    known = parse_known("serve")
    for flag, hint in OTHERS_FLAGS.items():
        assert flag not in known
        assert all(word in known for word in re.findall("--[a-z-]+", hint))


def parse_known(command: str) -> set[str]:
    return set(re.findall("--[a-z0-9-]+", run_cli(command, "--help").stdout))


def test_flags_of_vllm_for_what_happens_anyway_are_taken():
    flags = ("some/model", "--enable-lora", "--max-loras", "4", "--no-trust-remote-code")
    assert engine_config_from_arguments(parse(*flags)) == EngineConfig(model="some/model")
    with pytest.raises(ValueError, match="max_lora_rank=512 is not allowed: it must be 1 to 256"):
        engine_config_from_arguments(parse("--max-lora-rank", "512"))
    assert "--enable-lora" not in parse_known("serve")


def test_generate_without_a_prompt_loads_no_model():
    done = run_cli("generate", "--prompt", "")
    assert (done.returncode, done.stderr) == (
        2,
        "loraplex: prompt='' is not allowed: give --prompt TEXT, or a text on standard input\n"
        "heavy: []\n",
    )


def test_several_adapters_are_inspected_at_once(capsys):
    examples = Path(__file__).parents[2] / "examples" / "adapters"
    assert main(["adapters", "inspect", str(examples / "pirate"), str(examples / "haiku")]) == 0
    assert main(["adapters", "inspect", str(examples / "pirate"), str(examples)]) == 1
    text = capsys.readouterr().out
    assert text.count("adapter:     ") == 4
    assert text.count("\n\nadapter:     ") == 2
    assert text.count("refused:     ") == 1
