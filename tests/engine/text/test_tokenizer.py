"""The tokenizer of a model directory: chat template, end-of-sequence ids, decoding."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from loraplex.engine.text.tokenizer import load_tokenizer

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}"
    "{% endif %}<s>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
    "{% if suffix %}{{ suffix }}{% endif %}"
)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Two directories, with a chat template and without, of a byte-level tokenizer."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=True,
    )
    found = []
    for name, template in (("chat", TEMPLATE), ("plain", None)):
        found.append(tmp_path_factory.mktemp(name))
        wrapped.chat_template = template
        wrapped.save_pretrained(found[-1])
        (found[-1] / "config.json").write_text(json.dumps({"eos_token_id": 300}))
        (found[-1] / "generation_config.json").write_text(json.dumps({"eos_token_id": [301, 9]}))
    return found


@pytest.fixture(scope="module")
def tokenizer(paths):
    return load_tokenizer(paths[0])


def test_text_comes_back_as_it_was(tokenizer):
    text = "Oh , it 's 你好 😀!"
    token_ids = tokenizer.encode(text)
    assert all(type(token_id) is int for token_id in token_ids)
    assert tokenizer.decode(token_ids) == text, "spaces before marks are not cleaned up"
    assert tokenizer.decode(token_ids[:-3]).startswith("Oh , it")
    assert tokenizer.vocab_size == 258


def test_half_a_character_is_refused(tokenizer):
    for encode in (tokenizer.encode, tokenizer.encode_with_offsets):
        with pytest.raises(ValueError, match=r"character at 2, '\\ud83d', is none of Unicode"):
            encode("ab\ud83d")


def test_special_tokens_are_text_only_if_wanted(tokenizer):
    token_ids = [256, *tokenizer.encode("a"), 257]
    assert tokenizer.decode(token_ids) == "a"
    assert tokenizer.decode(token_ids, skip_special_tokens=False) == "<s>a</s>"


def test_end_of_sequence_ids_are_those_of_all_files(tokenizer):
    assert tokenizer.eos_token_ids == [9, 257, 300, 301]


TEXT = "Hello , it 's 你好 😀!  two"


def write_directory(path: Path, **tokenizer_config) -> None:
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 2}))
    values = {"bos_token": "<s>", "eos_token": "</s>", **tokenizer_config}
    (path / "tokenizer_config.json").write_text(json.dumps(values))


def test_a_sentencepiece_model_alone_is_enough(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(Path(__file__).read_text().splitlines()),
        model_prefix=str(tmp_path / "tokenizer"), vocab_size=400, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "tokenizer.vocab").unlink()
    write_directory(
        tmp_path, tokenizer_class="LlamaTokenizer", unk_token="<unk>", add_bos_token=True
    )
    tokenizer = load_tokenizer(tmp_path)
    own = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert tokenizer.encode(TEXT) == [1, *own.encode(TEXT)]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.eos_token_ids == [2]


@pytest.mark.parametrize("tokenizer_class", ["PreTrainedTokenizerFast", "LlamaTokenizer"])
def test_a_tiktoken_file_alone_is_enough(tokenizer_class, tmp_path):
    ranks = {bytes([i]): i for i in range(256)}
    for merged in (b"ll", b"llo", b"He", b"Hello", b" t", b"wo", b" two"):
        ranks[merged] = len(ranks)
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    (tmp_path / "tokenizer.model").write_text("".join(lines))
    write_directory(tmp_path, tokenizer_class=tokenizer_class)
    tokenizer = load_tokenizer(tmp_path)
    token_ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert token_ids[0] == ranks[b"Hello"]
    assert tokenizer.decode(token_ids) == TEXT


def test_the_chat_template_may_be_that_of_a_processor(paths, tmp_path):
    for directory, expected in zip(paths, ("<s></s><s>", "a"), strict=True):
        copied = shutil.copytree(directory, tmp_path / directory.name)
        (copied / "chat_template.json").write_text(json.dumps({"chat_template": "{{ 'a' }}"}))
        tokenizer = load_tokenizer(copied)
        token_ids = tokenizer.apply_chat_template([{"role": "user", "content": ""}])
        assert tokenizer.decode(token_ids, skip_special_tokens=False) == expected


def test_chat_template(tokenizer):
    messages = [{"role": "user", "content": "hi"}]
    token_ids = tokenizer.apply_chat_template(messages)
    assert type(token_ids) is list
    assert tokenizer.decode(token_ids, skip_special_tokens=False) == "<s>hi</s><s>"
    token_ids = tokenizer.apply_chat_template(messages, add_generation_prompt=False, suffix="!")
    assert tokenizer.decode(token_ids, skip_special_tokens=False) == "<s>hi</s>!"


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ nothing() }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content + 1 }}",
        "{% include '/etc/passwd' %}",
        "{% for",
    ],
)
def test_a_template_reaches_nothing_and_fails_by_itself(tokenizer, template):
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(ValueError, match="the chat template refuses the messages"):
        tokenizer.with_chat_template(template).apply_chat_template(messages)
    assert messages == [{"role": "user", "content": "hi"}]


def test_another_template(tokenizer):
    template = "{% for d in documents %}{{ d.text }}.{% endfor %}{{ messages[0].content }}"
    other = tokenizer.with_chat_template(template)
    assert other.chat_template == template != tokenizer.chat_template
    token_ids = other.apply_chat_template([{"content": "hi"}], documents=[{"text": "One"}])
    assert other.decode(token_ids) == "One.hi"


def test_a_template_that_refuses_says_why(tokenizer):
    with pytest.raises(ValueError, match="refuses the messages: no tools here"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}])


def test_without_a_chat_template(paths):
    tokenizer = load_tokenizer(paths[1])
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(ValueError, match=f"{paths[1]}.* has no chat template"):
        tokenizer.apply_chat_template(messages)
    token_ids = tokenizer.apply_chat_template(messages, chat_template="{{ messages[0].content }}?")
    assert tokenizer.decode(token_ids) == "hi?"


def test_no_tokenizer_there(tmp_path):
    with pytest.raises(ValueError, match=f"no tokenizer can be read from '{tmp_path}'"):
        load_tokenizer(tmp_path)
