"""Adapters' own chat templates and tokens."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from fakes import FakeCore
from tiny_tokenizer import write_tokenizer
from tokenizers import Tokenizer

from loraplex.engine.llm import LLM
from loraplex.engine.lora_request import LoRARequest, MergedAdapters
from loraplex.engine.sampling_params import SamplingParams
from loraplex.engine.text.adapter_tokenizers import AdapterTokenizers
from loraplex.engine.text.tokenizer import load_tokenizer

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def base_path(tmp_path_factory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("base"), 200)


@pytest.fixture(scope="module")
def base(base_path):
    return load_tokenizer(base_path)


@pytest.fixture
def tokenizers(base, base_path) -> AdapterTokenizers:
    return AdapterTokenizers(base, str(base_path))


def adapter(path: Path) -> LoRARequest:
    return LoRARequest(path.name, str(path))


def test_the_base_model_and_adapters_without_their_own_share_a_tokenizer(
    tokenizers, base, base_path, tmp_path
):
    write_tokenizer(tmp_path / "same", 200)
    (tmp_path / "none").mkdir()
    merged = MergedAdapters(
        adapters=(adapter(tmp_path / "same"), LoRARequest("a", "hub:acme/a")), weights=(1, 1)
    )
    for lora_request in (None, adapter(tmp_path / "same"), adapter(tmp_path / "none"),
                         LoRARequest("merged", merged_adapters=merged)):  # fmt: skip
        assert tokenizers.is_placed(lora_request)
        assert tokenizers.find(lora_request) is base
        assert tokenizers.is_at_hand(lora_request)


def test_files_of_an_adapter_from_elsewhere(base, base_path, tmp_path):
    """Where they are is learnt, for each token, and for a while."""
    now = 0.0
    tokenizers = AdapterTokenizers(base, str(base_path), clock=lambda: now)
    mine, theirs = (LoRARequest("a", "hub:acme/a", token=token) for token in ("x", "y"))
    for version in ("1", "2"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "chat_template.jinja").write_text(version)
    assert not tokenizers.is_placed(mine)
    tokenizers.learn(mine, "one", str(tmp_path / "1"))
    assert tokenizers.is_placed(mine) and not tokenizers.is_placed(theirs)
    assert not tokenizers.is_at_hand(mine)
    found = tokenizers.find(mine)
    assert found.chat_template == "1"
    same = LoRARequest("another name", "acme/a", scale=0.5, token="x")
    assert tokenizers.is_placed(same) and tokenizers.find(same) is found

    shutil.rmtree(tmp_path / "1")
    assert tokenizers.is_placed(mine) and tokenizers.find(mine) is found, "it was read"
    now = 61.0
    assert not tokenizers.is_placed(mine)
    assert tokenizers.known_version(mine) == "one"
    tokenizers.learn(mine, "one", None)
    assert tokenizers.is_placed(mine) and tokenizers.find(mine) is found
    now = 122.0
    tokenizers.learn(mine, "two", str(tmp_path / "2"))
    assert tokenizers.find(mine).chat_template == "2"
    tokenizers.forget(theirs)
    assert not tokenizers.is_placed(mine), "the version may be another for all"

    tokenizers.learn(theirs, "three", str(tmp_path / "gone"))
    assert not tokenizers.is_placed(theirs), "what is not there any more is asked for again"


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_template_is_the_adapters_own(tokenizers, base, tmp_path, name):
    template = "{{ messages[0].content }}!"
    text = template if name.endswith("jinja") else json.dumps({"chat_template": template})
    (tmp_path / name).write_text(text)
    assert not tokenizers.is_at_hand(adapter(tmp_path))
    found = tokenizers.find(adapter(tmp_path))
    assert found.decode(found.apply_chat_template(MESSAGES)) == "hi!"
    assert found.chat_template == template
    assert tokenizers.find(adapter(tmp_path)) is found
    with pytest.raises(ValueError, match="no chat template"):
        base.apply_chat_template(MESSAGES)


def test_a_template_that_changes_is_read_again(tokenizers, tmp_path):
    file = tmp_path / "chat_template.jinja"
    for number in range(2):
        file.write_text(f"{number}")
        os.utime(file, ns=(0, number))
        found = tokenizers.find(adapter(tmp_path))
        assert found.decode(found.apply_chat_template(MESSAGES)) == str(number)


def test_files_that_can_not_be_read_are_told(tokenizers, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="can't be read"):
        tokenizers.find(adapter(tmp_path))


def test_added_tokens_are_read_and_written(base, base_path, tmp_path):
    """Offline: an adapter's own token and its own end of sequence."""
    write_tokenizer(tmp_path, 201)
    own = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    own.add_tokens(["<cat>"])
    cat = own.token_to_id("<cat>")
    own.save(str(tmp_path / "tokenizer.json"))
    core = FakeCore()
    core.model_info.tokenizer_path = str(base_path)
    llm = LLM.from_core(core, base)
    params = SamplingParams(max_tokens=4, logprobs=0)
    outputs = llm.generate(["a<cat>b"] * 2, params, [None, adapter(tmp_path)], use_tqdm=False)
    plain, output = (o.outputs[0] for o in outputs)
    assert plain.text == "a<ca"
    assert outputs[1].prompt_token_ids == [ord("a"), cat, ord("b")]
    assert output.text.startswith("a<cat>b")
    assert [next(iter(e.values())).decoded_token for e in output.logprobs][:3] == [
        "a",
        "<cat>",
        "b",
    ]
    assert 201 in core.seen[1].eos_token_ids and 201 not in core.seen[0].eos_token_ids
