"""What the server refuses: with which status, about which parameter, in which words."""

from __future__ import annotations

from types import SimpleNamespace

import httpx
import openai
import pytest

from loraplex.entrypoints.app import build_app
from loraplex.entrypoints.http.metrics import ServerMetrics
from loraplex.entrypoints.http.model_registry import ModelRegistry
from loraplex.entrypoints.http.server_config import ServerConfig
from loraplex.entrypoints.http.serving import Serving

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "fake", "prompt": "hi"}


def post(server, path: str, body) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body)


def error_of(response: httpx.Response) -> dict:
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"temperature": 200}, "temperature", "0 to 100"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"temperature": True}, "temperature", "number"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"n": 0}, "n", "1 to 128"),
        ({"n": 1.5}, "n", "integer"),
        ({"seed": "x"}, "seed", "integer"),
        ({"stop": [""]}, "stop", "non-empty"),
        ({"stop": [1]}, "stop[0]", "string"),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"stream_options": {"include_usage": True}}, None, "stream=True"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "not a field"),
        ({"logit_bias": {"hi": 1}}, "logit_bias", "token id"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "-100 to 100"),
        ({"allowed_token_ids": []}, "allowed_token_ids", "one token id at least"),
        ({"allowed_token_ids": ["x"]}, "allowed_token_ids[0]", "integer"),
        ({"bad_words": [""]}, "bad_words", "non-empty"),
        (
            {"bad_words": ["x"], "response_format": {"type": "json_object"}},
            "bad_words",
            "structured_outputs",
        ),
        ({"min_tokens": 20, "max_tokens": 10}, "min_tokens", "max_tokens=10"),
        ({"max_tokens": 0}, "max_tokens", "1 or more"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_object"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one of"),
        ({"structured_outputs": {"regex": "a", "x": 1}}, "structured_outputs.x", "not a field"),
        ({"use_beam_search": True, "top_p": 0.5}, None, "top_p"),
        ({"use_beam_search": True, "stream": True}, None, "stream"),
        ({"use_beam_search": True, "temperature": 1}, None, "temperature=1"),
        ({"use_beam_search": True, "n": 65}, None, "1 to 64"),
        ({"length_penalty": 2.0}, None, "use_beam_search=True"),
        *(
            ({field: value}, field, "not supported")
            for field, value in {
                "kv_transfer_params": {"a": 1},
                "logits_processors": ["x"],
                "logprob_token_ids": [1],
                "repetition_detection": {},
                "stream_interval": 5,
                "thinking_token_budget": 9,
                "vllm_xargs": {"a": 1},
                "watermarking": True,
                "spaces_between_special_tokens": False,
                "return_weight_versions": True,
            }.items()
        ),
        ({"truncate_prompt_tokens": 0}, None, "1 or more, or -1"),
        ({"truncation_side": "left"}, None, "truncate_prompt_tokens"),
        ({"cache_salt": ""}, "cache_salt", "1 character"),
        ({"service_tier": "flex"}, "service_tier", "not supported"),
        ({"stream": True, "prompt_logprobs": 1}, None, "prompt_logprobs"),
        ({"temprature": 1}, "temprature", "not a field"),
    ],
)
@pytest.mark.parametrize(("path", "body"), [("/v1/completions", TEXT),
                                            ("/v1/chat/completions", CHAT)])  # fmt: skip
def test_bad_values_of_both_routes(server, path, body, changes, param, words):
    response = post(server, path, {**body, **changes})
    assert response.status_code == 400
    error = error_of(response)
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert words in error["message"]


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"prompt": None}, "prompt", "non-empty"),
        ({"prompt": []}, "prompt", "non-empty"),
        ({"prompt": ["a", 1]}, "prompt", "non-empty"),
        ({"prompt": [[1], []]}, "prompt", "non-empty"),
        ({"prompt": [100_000]}, None, "100000"),
        ({"best_of": 1, "n": 2}, None, "at least n=2"),
        ({"best_of": 2, "stream": True}, None, "best_of"),
        ({"suffix": "x"}, "suffix", "not supported"),
        ({"logprobs": 101}, "logprobs", "0 to 100"),
        ({"logprobs": True}, "logprobs", "integer"),
        ({"messages": []}, "messages", "not a field"),
    ],
)
def test_bad_values_of_completions(server, changes, param, words):
    response = post(server, "/v1/completions", {**TEXT, **changes})
    assert response.status_code == 400
    error = error_of(response)
    assert param in (None, error["param"])
    assert words in error["message"]


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "user"}]}, "messages[0]", "content is missing"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "'user'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
         "messages[0].content", "text part"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
         "messages[0].tool_calls[0].id", "missing"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "missing"),
        ({"tool_choice": "required"}, None, "only allowed with tools"),
        ({"functions": [{}]}, "functions", "not supported"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "not supported"),
        ({"top_logprobs": 2}, None, "logprobs=True"),
        ({"logprobs": 2}, "logprobs", "boolean"),
        ({"chat_template_kwargs": {"tokenize": False}}, None, "tokenize"),
        ({"chat_template_kwargs": {"nonsense": 1}}, None, "nonsense"),
        ({"documents": [{"text": "x"}]}, "documents", "shows none"),
        ({"chat_template": ""}, "chat_template", "1 character"),
        ({"continue_final_message": True, "add_generation_prompt": True}, None, "not allowed"),
        ({"prompt": "x"}, "prompt", "not a field"),
    ],
)  # fmt: skip
def test_bad_values_of_chats(server, changes, param, words):
    response = post(server, "/v1/chat/completions", {**CHAT, **changes})
    assert response.status_code == 400
    error = error_of(response)
    assert error["param"] == param
    assert words in error["message"]


def test_bodies_that_are_no_objects(server):
    url = f"{server.url}/v1/completions"
    for content in (b"{", b"", b"[]", b"3"):
        response = httpx.post(url, content=content, headers={"content-type": "application/json"})
        assert response.status_code == 400, content
        assert error_of(response)["type"] == "invalid_request_error"
    assert error_of(post(server, "/v1/completions", {"prompt": "x"}))["param"] == "model"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", ["nobody", "acme/adapter", "/etc"])
def test_an_unknown_model_is_404(client, model, stream):
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model=model, prompt="x", stream=stream)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert model in caught.value.message
    assert "--allow-runtime-lora" in caught.value.message


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("options", [{"prompt": "x" * 2000}, {"prompt": "x", "max_tokens": 1024}])
def test_a_context_that_is_too_long(client, options, stream):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="fake", stream=stream, **options)
    assert caught.value.code == "context_length_exceeded"
    assert "1024" in caught.value.message


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("model", "kind"),
    [("missing", openai.NotFoundError), ("broken", openai.BadRequestError)],
)
def test_what_the_engine_refuses_has_its_own_status_even_for_streams(client, model, kind, stream):
    with pytest.raises(kind, match=model):
        client.completions.create(model=model, prompt="x", stream=stream)


def test_one_bad_prompt_of_several_fails_the_request(client, server):
    with pytest.raises(openai.BadRequestError, match="max_model_len"):
        client.completions.create(model="fake", prompt=["long", "x" * 2000], max_tokens=900)
    server.wait_for_metric("loraplex_num_requests_running", 0)


def test_unknown_routes_and_methods(server):
    assert error_of(httpx.get(f"{server.url}/v1/nothing"))["message"] == "Not Found"
    response = httpx.get(f"{server.url}/v1/completions")
    assert response.status_code == 405
    assert error_of(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "content_type", "words"),
    [
        (b'{"model": "fake"', "application/json", "the body is no JSON: Expecting"),
        (b'{"model": "\xff"}', "application/json", "the body is no JSON: it is not in UTF-8"),
        (b"[1]", "application/json", "the body is no JSON object"),
        (b"", "application/json", "the body is missing: it must be a JSON object"),
        (b'{"a": 1}', "text/plain", "no JSON object (its Content-Type must be application/json)"),
    ],
)
def test_a_body_that_is_no_json_object(server, body, content_type, words):
    response = httpx.post(
        f"{server.url}/v1/completions", content=body, headers={"Content-Type": content_type}
    )
    assert response.status_code == 400
    assert words in error_of(response)["message"]
    assert ("Content-Type" in error_of(response)["message"]) == (content_type == "text/plain")


class BrokenEngine:
    """Fails in a way that nobody foresaw."""

    tokenizer = None
    model_info = SimpleNamespace(max_model_len=100, default_sampling={})

    async def generate(self, *args, **options):
        raise KeyError("a mistake of ours")
        yield

    async def stats(self):
        raise KeyError("a mistake of ours")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"model": "fake", "prompt": [1, 2]}),
        ("/v1/completions", {"model": "fake", "prompt": [[1], [2]]}),
        ("/v1/completions", {"model": "fake", "prompt": [1, 2], "stream": True}),
        ("/v1/embeddings", {"model": "fake", "input": [1, 2]}),
        ("/metrics", None),
    ],
)
async def test_what_nobody_foresaw_is_logged_once(path, body, caplog):
    serving = Serving(BrokenEngine(), ModelRegistry(["fake"], "", 100), ServerMetrics())
    app = build_app(serving, ServerConfig(), keys=None)
    # What the application raises would be logged by the server, too.
    transport = httpx.ASGITransport(app, raise_app_exceptions=True)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        response = await client.request("GET" if body is None else "POST", path, json=body)
    assert response.status_code == 500
    assert error_of(response)["code"] == "internal_error"
    errors = [record for record in caplog.records if record.levelname == "ERROR"]
    assert [record.exc_info[0] for record in errors] == [KeyError]
