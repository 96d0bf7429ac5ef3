"""What users may give, what it becomes, and how their mistakes are named."""

from __future__ import annotations

import numpy as np
import pytest
from fakes import BOS, EOS, ByteTokenizer

from loraplex.engine.lora_request import LoRARequest
from loraplex.engine.messages import ModelInfo, Service
from loraplex.engine.sampling_params import SamplingParams
from loraplex.engine.text.input_processor import InputProcessor, prompt_text

MODEL = ModelInfo(
    model_name="m",
    tokenizer_path="",
    max_model_len=20,
    vocab_size=300,
    eos_token_ids=[299],
    dtype="float32",
    device="cpu",
)


def processor(tokenizer=None, seed=0):
    return InputProcessor(MODEL, tokenizer, seed)


@pytest.mark.parametrize(
    ("prompt", "token_ids", "text"),
    [
        ("hi", [BOS, 104, 105], "hi"),
        ({"prompt": "hi"}, [BOS, 104, 105], "hi"),
        ([5, 6], [5, 6], None),
        (np.array([5, 6]), [5, 6], None),
        ((5, np.int64(6)), [5, 6], None),
        ({"prompt_token_ids": [5, 6]}, [5, 6], None),
        ({"prompt_token_ids": [5, 6], "prompt": "five"}, [5, 6], "five"),
        ("", [BOS], ""),
    ],
)
def test_forms_of_a_prompt(prompt, token_ids, text):
    (request,) = processor(ByteTokenizer()).process("r", prompt, SamplingParams())
    assert request.request_id == "r"
    assert request.prompt_token_ids == token_ids
    assert all(type(token_id) is int for token_id in request.prompt_token_ids)
    assert request.eos_token_ids == [EOS, 299]
    assert prompt_text(prompt) == text


def test_completions_are_requests_whose_seeds_count_up():
    lora_request = LoRARequest("a", "/a")
    requests = processor().process(
        "r", [1], SamplingParams(n=3, seed=2**64 - 1), lora_request, service=Service(tenant="t")
    )
    assert [r.request_id for r in requests] == ["r#0", "r#1", "r#2"]
    assert [r.seed for r in requests] == [2**64 - 1, 0, 1]
    assert {(r.lora_request, r.service.tenant) for r in requests} == {(lora_request, "t")}


def test_requests_without_a_seed_draw_from_the_engines():
    def draw(engine_seed):
        source = processor(seed=engine_seed)
        return [source.process("r", [1], SamplingParams())[0].seed for _ in range(3)]

    assert draw(1) == draw(1)
    assert len(set(draw(1) + draw(2))) == 6


@pytest.mark.parametrize(("max_tokens", "expected"), [(None, 17), (5, 5), (17, 17), (100, 17)])
def test_max_tokens_ends_with_the_models_length(max_tokens, expected):
    (request,) = processor().process("r", [1, 2, 3], SamplingParams(max_tokens=max_tokens))
    assert request.max_tokens == expected


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, r"prompt=\[\] .* one token at least"),
        ({"prompt_token_ids": []}, {}, "one token at least"),
        ({}, {}, "a dict must have prompt_token_ids"),
        ({"prompt": "hi", "images": []}, {}, "images.*nothing else"),
        (None, {}, "prompt=None .* a string, a list of token ids, or a dict with either"),
        ([1.5], {}, r"prompt=\[1.5\] .* list of token ids"),
        ([[1]], {}, "list of token ids"),
        (["a"], {}, "list of token ids"),
        (b"ab", {}, "prompt=b'ab' .* list of token ids"),
        ({"prompt_token_ids": "ab"}, {}, "prompt_token_ids='ab' .* a list of integers"),
        ({"prompt": [1]}, {}, r"prompt=\[1\] .* a string"),
        ([1, -1], {}, "-1 in prompt .* 0 to 299"),
        ([300, 1], {}, "300 in prompt .* 0 to 299"),
        ([1] * 20, {}, "prompt of 20 tokens .* at most 19.*max_model_len=20"),
        ("hi there, model of mine", {}, "prompt of 24 tokens"),
        ([1] * 15, {"min_tokens": 6, "max_tokens": None}, "min_tokens=6 .* at most 5"),
        ([1], {"stop_token_ids": [300]}, "300 in stop_token_ids"),
        ([1], {"logit_bias": {5: 1.0, 300: 1.0}}, "300 in logit_bias"),
        ([1], {"allowed_token_ids": [5, 300]}, "300 in allowed_token_ids"),
        ([1], {"stop": "x", "detokenize": False}, r"stop=\('x',\) .* detokenize=True"),
    ],
)
def test_mistakes_are_named(prompt, params, message):
    with pytest.raises(ValueError, match=message):
        processor(ByteTokenizer()).process("r", prompt, SamplingParams(**params))


def test_without_a_tokenizer_there_is_no_text():
    with pytest.raises(ValueError, match="prompt='hi' .* token ids"):
        processor().process("r", "hi", SamplingParams())
    with pytest.raises(ValueError, match="stop=.* needs a tokenizer"):
        processor().process("r", [1], SamplingParams(stop="x"))
    with pytest.raises(ValueError, match="bad_words is not allowed without a tokenizer"):
        processor().process("r", [1], SamplingParams(bad_words=["x"]))


class WordTokenizer(ByteTokenizer):
    """Knows "hi" and " hi" as tokens of their own."""

    def encode(self, text, add_special_tokens=True):
        whole = {"hi": [270], " hi": [271]}
        return whole.get(text) or super().encode(text, add_special_tokens)


@pytest.mark.parametrize(
    ("words", "token_ids"),
    [
        (["hi"], [[270], [271]]),
        ([" hi"], [[270], [271]]),
        (["ho"], [[104, 111]]),  # behind a space, it ends the same
        (["\n"], [[10]]),
        ([], []),
    ],
)
def test_bad_words_begin_a_text_or_follow_a_space(words, token_ids):
    params = SamplingParams(bad_words=words)
    (request,) = processor(WordTokenizer()).process("r", [1], params)
    assert request.bad_words_token_ids == token_ids
    (request,) = processor(ByteTokenizer()).process("r", [1], params, tokenizer=WordTokenizer())
    assert request.bad_words_token_ids == token_ids, "an adapter's own tokenizer splits them"
