"""LoRAX's routes by the real lorax-client, and by hand for what the client does not show.

The fake core echoes the prompt, with "long" it gives letters without end; a token is a byte.
"""

from __future__ import annotations

import asyncio
import json

import httpx
import lorax
import pytest
from lorax import errors
from pydantic import ValidationError
from server_process import running_server

from loraplex.engine.structured_outputs.params import StructuredOutputsParams
from loraplex.entrypoints.lorax.requests import GenerateParameters


@pytest.fixture
def lorax_client(server) -> lorax.Client:
    return lorax.Client(server.url, timeout=20)


def post(server, path: str, inputs: str = "hello", **parameters) -> httpx.Response:
    body = {"inputs": inputs, "parameters": parameters}
    return httpx.post(f"{server.url}{path}", json=body, timeout=20)


def test_generate(lorax_client):
    response = lorax_client.generate("hello")
    assert response.generated_text == "hello"
    details = response.details
    assert (details.finish_reason, details.prompt_tokens) == ("eos_token", 6)
    assert details.generated_tokens == len(details.tokens) == 6
    assert [token.text for token in details.tokens] == [*"hello", "</s>"]
    assert [token.special for token in details.tokens] == [False] * 5 + [True]
    assert details.tokens[0].id == ord("h")
    assert {token.logprob for token in details.tokens} == {-0.5}
    assert (details.seed, details.prefill, details.best_of_sequences) == (None, [], None)


def test_generate_with_an_adapter_and_everything_that_is_served(lorax_client):
    response = lorax_client.generate(
        "long",
        adapter_id="sql",
        do_sample=True,
        max_new_tokens=12,
        ignore_eos_token=True,
        repetition_penalty=1.1,
        return_full_text=True,
        seed=7,
        stop_sequences=["ef"],
        temperature=0.5,
        top_k=10,
        top_p=0.9,
        decoder_input_details=True,
        return_k_alternatives=2,
    )
    assert response.generated_text == "longabcdef"
    details = response.details
    assert (details.finish_reason, details.seed) == ("stop_sequence", 7)
    assert [token.text for token in details.prefill] == ["<s>", *"long"]
    assert details.prefill[0].logprob is None
    assert details.prefill[1].logprob == -0.5
    alternatives = details.tokens[0].alternative_tokens
    assert [(t.id, t.logprob) for t in alternatives] == [(0, -1.0), (1, -2.0)]


def test_generate_streams_a_token_at_a_time(lorax_client):
    *events, last = lorax_client.generate_stream("héllo", adapter_id="poet", return_full_text=True)
    assert [event.token.text for event in events] == ["h", "", "é", *"llo"]
    assert all(event.generated_text is None and event.details is None for event in events)
    assert (last.token.text, last.token.special) == ("</s>", True)
    assert last.generated_text == "héllohéllo"
    details = last.details
    assert (details.finish_reason, details.prompt_tokens, details.generated_tokens) == (
        "eos_token",
        7,
        7,
    )


def test_a_stream_ends_at_a_stop_sequence_and_keeps_it(lorax_client):
    events = list(lorax_client.generate_stream("long", stop_sequences=["de"], max_new_tokens=9))
    assert "".join(event.token.text for event in events) == "abcde"
    assert events[-1].generated_text == "abcde"
    assert events[-1].details.finish_reason == "stop_sequence"


def test_the_best_of_several(lorax_client):
    response = lorax_client.generate("long", do_sample=True, best_of=3, max_new_tokens=4)
    assert response.generated_text == "abcd"
    others = response.details.best_of_sequences
    assert [s.generated_text for s in others] == ["abcd"] * 2
    assert others[0].generated_tokens == len(others[0].tokens) == 4


async def test_the_asynchronous_client(server):
    client = lorax.AsyncClient(server.url)
    response, events = await asyncio.gather(
        client.generate("hello", adapter_id="sql"), collect(client.generate_stream("hello"))
    )
    assert response.generated_text == events[-1].generated_text == "hello"


async def collect(events) -> list:
    return [event async for event in events]


def test_errors_are_the_client_s_own(lorax_client):
    for adapter_id in ("nobody", "missing", "broken"):
        with pytest.raises(errors.GenerationError, match=adapter_id):
            lorax_client.generate("hello", adapter_id=adapter_id)
        with pytest.raises(errors.GenerationError, match=adapter_id):
            list(lorax_client.generate_stream("hello", adapter_id=adapter_id))
    with pytest.raises(errors.ValidationError, match="max_new_tokens"):
        lorax_client.generate("hello", max_new_tokens=10_000)
    with pytest.raises(errors.ValidationError, match="watermark"):
        lorax_client.generate("hello", watermark=True)
    with pytest.raises(errors.ValidationError, match="typical_p"):
        lorax_client.generate("hello", typical_p=0.5)
    with pytest.raises(errors.ValidationError, match="does not support classification"):
        lorax_client.classify("hello")
    with pytest.raises(errors.ValidationError, match="does not support classification"):
        lorax_client.classify_batch(["hello"])


@pytest.mark.parametrize(
    ("parameters", "word"),
    [
        ({"best_of": 0}, "best_of"),
        ({"best_of": 2}, "best_of"),
        ({"best_of": 2, "do_sample": True, "seed": 1}, "seed"),
        ({"best_of": 1000, "do_sample": True}, "1000"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"presence_penalty": -2.5}, "presence_penalty"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"typical_p": 0.5}, "typical_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 1019}, "max_new_tokens"),
        ({"stop": "x"}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"truncate": 0}, "truncate"),
        ({"watermark": True}, "watermark"),
        ({"return_k_alternatives": 0}, "return_k_alternatives"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"no_such_field": 1}, "no_such_field"),
        ({"adapter_id": "sql", "merged_adapters": {"ids": ["sql"], "weights": [1]}}, "adapter_id"),
        ({"merged_adapters": {"ids": [], "weights": []}}, "ids"),
        ({"merged_adapters": {"ids": ["sql", "poet"], "weights": [1]}}, "weights"),
        ({"merged_adapters": {"ids": ["sql"], "weights": [1], "merge_strategy": "x"}}, "strategy"),
        ({"merged_adapters": {"ids": ["sql"], "weights": [1], "merge_strategy": "ties"}},
         "density"),
    ],
)  # fmt: skip
def test_what_is_not_allowed_is_a_422_that_names_it(server, parameters, word):
    response = post(server, "/generate", **parameters)
    assert response.status_code == 422, response.text
    body = response.json()
    assert body.keys() == {"error", "error_type"}
    assert body["error_type"] == "validation"
    assert body["error"].startswith("Input validation error: ")
    assert word in body["error"]


def test_adapters_from_their_source(adapter_root):
    flags = ("--allow-runtime-lora", str(adapter_root), "--lora-modules", f"x={adapter_root}/sql")
    with running_server(*flags) as server:
        client = lorax.Client(server.url, timeout=20)
        path = str(adapter_root / "poet")
        for source in (None, "local"):
            response = post(server, "/generate", adapter_id=path, adapter_source=source)
            assert response.json() == {"generated_text": "hello"}
            assert response.headers["x-adapter-id"] == path
            assert response.headers["x-adapter-source"] == "local"
        assert client.generate("hello", adapter_id="x").generated_text == "hello"
        merged = lorax.MergedAdapters(ids=["x", path], weights=[0.5, 0.5], density=0.5)
        assert client.generate("hello", merged_adapters=merged).generated_text == "hello"
        for adapter_id in ("/etc", f"{adapter_root}/../nowhere", f"{adapter_root}/nothing"):
            with pytest.raises(errors.GenerationError, match="not allowed"):
                client.generate("hello", adapter_id=adapter_id)
        with pytest.raises(errors.GenerationError, match="--allow-runtime-lora"):
            client.generate("hello", adapter_id="owner/name", adapter_source="hub")
        with pytest.raises(errors.ValidationError, match="pbase"):
            client.generate("hello", adapter_id="x", adapter_source="pbase")


def test_a_key_is_for_each_of_the_merged_adapters(adapter_root, tmp_path):
    keys = tmp_path / "keys.toml"
    keys.write_text('[[keys]]\nname = "a"\nkey = "k"\nadapters = ["sql*"]\n')
    modules = [f"{name}={adapter_root / name}" for name in ("sql", "poet")]
    flags = ("--api-key-file", str(keys), "--lora-modules", *modules)
    with running_server(*flags) as server:
        client = lorax.Client(server.url, headers={"authorization": "Bearer k"})
        assert client.generate("hello", adapter_id="sql").generated_text == "hello"
        merged = lorax.MergedAdapters(ids=["sql", "poet"], weights=[1, 1], density=1)
        with pytest.raises(errors.ShardNotReadyError, match="not for the adapter 'poet'"):
            client.generate("hello", merged_adapters=merged)


@pytest.mark.parametrize(
    "body", [{}, {"inputs": ""}, {"inputs": 1}, {"inputs": "x", "parameters": 1}, []]
)
def test_a_wrong_body_is_a_422(server, body):
    response = httpx.post(f"{server.url}/generate", json=body)
    assert (response.status_code, response.json()["error_type"]) == (422, "validation")


def test_nulls_ask_for_nothing(server):
    body = {"inputs": "hello", "parameters": None, "top_n_tokens": None}
    assert httpx.post(f"{server.url}/generate", json=body).json() == {"generated_text": "hello"}
    response = post(server, "/generate", adapter_id="", seed=None, grammar=None)
    assert response.json() == {"generated_text": "hello"}


def test_streams_refuse_what_needs_the_whole(server):
    for parameters in ({"best_of": 2, "do_sample": True}, {"decoder_input_details": True}):
        response = post(server, "/generate_stream", **parameters)
        assert (response.status_code, response.json()["error_type"]) == (422, "validation")


def test_truncate_keeps_the_end_and_a_template_can_be_applied(server):
    assert post(server, "/generate", truncate=3).json()["generated_text"] == "llo"
    text = post(server, "/generate", apply_chat_template=True).json()["generated_text"]
    assert text == "user: helloassistant: "


def test_sampling_is_on_where_a_parameter_asks_for_it(server):
    for parameters, is_on in [
        ({}, False), ({"do_sample": True}, True), ({"do_sample": True, "temperature": 0}, False),
        ({"temperature": 0.7}, True), ({"top_k": 3}, True), ({"top_p": 0.5}, True),
        ({"top_p": 1.0, "temperature": 1.0}, False),
    ]:  # fmt: skip
        details = post(server, "/generate", details=True, **parameters).json()["details"]
        assert (details["seed"] is not None) == is_on, parameters


def test_headers(server):
    response = post(server, "/generate", adapter_id="sql", max_new_tokens=3)
    headers = response.headers
    assert headers["x-prompt-tokens"] == "6"
    assert headers["x-generated-tokens"] == "3"
    assert headers["x-total-tokens"] == "9"
    assert headers["x-skipped-tokens"] == "0"
    assert headers["x-compute-characters"] == "5"
    assert headers["x-compute-type"] == "cpu+optimized"
    assert headers["x-model-id"] == "fake"
    assert headers["x-adapter-id"] == "sql"
    assert headers["x-adapter-source"] == "local"
    times = ("compute-time", "total-time", "validation-time", "queue-time", "inference-time",
             "time-per-token", "time-to-first-token", "time-per-output-token")  # fmt: skip
    assert all(0 <= int(headers[f"x-{name}"]) < 5000 for name in times)
    assert "x-adapter-id" not in post(server, "/generate").headers


def test_the_stream_s_bytes(server):
    response = post(server, "/generate_stream", inputs="hi", details=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-model-id"] == "fake"
    *events, last = [json.loads(line[5:]) for line in response.text.split("\n") if line]
    assert events[0] == {
        "token": {"id": 104, "text": "h", "logprob": -0.5, "special": False, "skipped": False},
        "generated_text": None,
        "details": None,
    }
    assert last["details"] == {
        "finish_reason": "eos_token",
        "prompt_tokens": 3,
        "generated_tokens": 3,
        "seed": None,
        "skipped_tokens": 0,
    }


def test_the_response_format_is_what_the_engine_is_asked_for():
    def asked(**response_format) -> StructuredOutputsParams | None:
        parameters = GenerateParameters(response_format=response_format)
        return parameters.sampling_params(stream=False).structured_outputs

    schema = {"type": "object", "properties": {"name": {"type": "string"}}}
    for name in ("json_object", "json_schema", "JsonObject"):
        assert asked(type=name, schema=schema) == StructuredOutputsParams(json=schema)
        assert asked(type=name) == StructuredOutputsParams(json_object=True)
    assert asked(type="text") is None
    for wrong in ({"type": "xml"}, {"type": "json_object", "schema": 1}, {"schema": schema}):
        with pytest.raises(ValidationError):
            asked(**wrong)


def test_what_embed_refuses(server):
    body = {"inputs": "hello", "parameters": {"adapter_id": "nobody"}}
    response = httpx.post(f"{server.url}/embed", json=body)
    assert (response.status_code, response.json()["error_type"]) == (424, "generation")
    body = {"inputs": "", "parameters": None}
    assert httpx.post(f"{server.url}/embed", json=body).status_code == 422


def test_both_forms_of_the_compatible_route(server):
    for path in ("/", "/invocations"):
        url = f"{server.url}{path}"
        assert httpx.post(url, json={"inputs": "hi"}).json() == [{"generated_text": "hi"}]
        text = httpx.post(url, json={"inputs": "hi", "stream": True}).text
        assert text.count("data:") == 3
        assert httpx.post(url, json={"inputs": "hi", "stream": 1}).status_code == 422


def test_tokenize(server):
    body = {"inputs": "aé"}
    assert httpx.post(f"{server.url}/tokenize", json=body).json() == [
        {"id": 256, "text": "", "start": 0, "stop": 0},
        {"id": 97, "text": "a", "start": 0, "stop": 1},
        {"id": 195, "text": "é", "start": 1, "stop": 2},
        {"id": 169, "text": "é", "start": 1, "stop": 2},
    ]
    body["add_special_tokens"] = False
    assert len(httpx.post(f"{server.url}/tokenize", json=body).json()) == 3


def test_info_and_health(server):
    info = httpx.get(f"{server.url}/info").json()
    assert info["model_id"] == "smollm2-135m-instruct"
    assert (info["model_dtype"], info["model_device_type"]) == ("torch.float32", "cpu")
    assert (info["max_input_length"], info["max_total_tokens"]) == (1023, 1024)
    assert info["max_stop_sequences"] == 16
    for path in ("/", "/health", "/ping"):
        response = httpx.get(f"{server.url}{path}")
        assert (response.status_code, response.content) == (200, b"")
