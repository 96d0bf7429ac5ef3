"""vLLM's /tokenize and /detokenize, beside LoRAX's /tokenize."""

from __future__ import annotations

import httpx
import pytest


def post(server, path: str, body: dict) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body)


def test_a_text_there_and_back(server):
    answer = post(server, "/tokenize", {"model": "fake", "prompt": "hi", "return_token_strs": True})
    assert answer.json() == {
        "count": 3,
        "max_model_len": 1024,
        "tokens": [256, 104, 105],
        "token_strs": ["<s>", "h", "i"],
    }
    back = post(server, "/detokenize", {"model": "fake", "tokens": answer.json()["tokens"]})
    assert back.json() == {"prompt": "<s>hi"}
    bare = post(server, "/tokenize", {"prompt": "hi", "add_special_tokens": False}).json()
    assert (bare["tokens"], bare["token_strs"]) == ([104, 105], None)


def test_a_conversation(server):
    tool = {"type": "function", "function": {"name": "add"}}
    body = {"model": "sql", "messages": [{"role": "user", "content": "x"}], "tools": [tool]}
    tokens = post(server, "/tokenize", body).json()["tokens"]
    text = post(server, "/detokenize", {"tokens": tokens}).json()["prompt"]
    assert text == "<s>add, <turn>user: x<turn>assistant: "
    body["add_generation_prompt"] = False
    assert len(post(server, "/tokenize", body).json()["tokens"]) < len(tokens)


def test_a_body_with_inputs_is_loraxs(server):
    assert post(server, "/tokenize", {"inputs": "hi", "prompt": "hi"}).status_code == 422
    answer = post(server, "/tokenize", {"inputs": ""})
    assert answer.status_code in (200, 404)  # The fake tokenizer knows no offsets.


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": 1}),
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "nonsense": 1}),
        ("/detokenize", {"tokens": [259]}),
        ("/detokenize", {"tokens": ["a"]}),
    ],
)
def test_mistakes(server, path, body):
    assert post(server, path, body).status_code in (400, 422)


def test_unknown_models(server):
    assert post(server, "/detokenize", {"model": "nobody", "tokens": [1]}).status_code == 404
