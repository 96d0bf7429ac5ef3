"""POST /v1/completions through the official client."""

from __future__ import annotations

import httpx
import pytest

ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def test_text_usage_and_finish_reason(client):
    completion = client.completions.create(model="fake", prompt="hello", max_tokens=50)
    (choice,) = completion.choices
    assert completion.object == "text_completion"
    assert completion.model == "fake"
    assert completion.id.startswith("cmpl-")
    assert (choice.index, choice.text, choice.finish_reason) == (0, "hello", "stop")
    assert choice.logprobs is None
    usage = completion.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (6, 6, 12)
    assert usage.prompt_tokens_details.cached_tokens == 3


def test_max_tokens_is_16_by_default(client):
    completion = client.completions.create(model="fake", prompt="long")
    assert (completion.choices[0].text, completion.choices[0].finish_reason) == (
        ALPHABET[:16],
        "length",
    )


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        (["one", "two"], ["one", "two"]),
        ([104, 105], ["hi"]),
        ([[104, 105], [106]], ["hi", "j"]),
    ],
)
def test_every_shape_of_prompt(client, prompt, texts):
    completion = client.completions.create(model="fake", prompt=prompt)
    assert [choice.text for choice in completion.choices] == texts
    assert [choice.index for choice in completion.choices] == list(range(len(texts)))


def test_several_prompts_times_n_count_all_tokens(client):
    completion = client.completions.create(model="fake", prompt=["one", "three"], n=2, best_of=2)
    assert [c.text for c in completion.choices] == ["one", "one", "three", "three"]
    assert [c.index for c in completion.choices] == [0, 1, 2, 3]
    assert completion.usage.prompt_tokens == 4 + 6
    assert completion.usage.completion_tokens == 2 * 4 + 2 * 6


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_the_text(client, stream):
    options = {"model": "fake", "prompt": "long", "max_tokens": 100, "stop": ["xyz", "efg"]}
    if stream:
        chunks = list(client.completions.create(**options, stream=True))
        text = "".join(chunk.choices[0].text for chunk in chunks)
        last = chunks[-1].choices[0]
    else:
        last = client.completions.create(**options).choices[0]
        text = last.text
    assert text == "abcd"
    assert (last.finish_reason, last.stop_reason) == ("stop", "efg")


def test_one_stop_string_may_be_kept(client):
    completion = client.completions.create(
        model="fake", prompt="long", stop="d", extra_body={"include_stop_str_in_output": True}
    )
    assert completion.choices[0].text == "abcd"


def test_vllm_fields_reach_the_engine(client):
    completion = client.completions.create(
        model="fake",
        prompt="hello",
        max_tokens=20,
        seed=7,
        logit_bias={"7": -100},
        extra_body={
            "ignore_eos": True, "min_tokens": 2, "top_k": 5, "min_p": 0.1,
            "repetition_penalty": 1.1, "stop_token_ids": [1], "skip_special_tokens": False,
        },
    )  # fmt: skip
    assert completion.choices[0].text == "hello" + "</s>" * 15
    stopped = client.completions.create(
        model="fake", prompt="long", extra_body={"stop_token_ids": [ord("c")]}
    )
    assert stopped.choices[0].stop_reason == ord("c")


def test_tokens_in_numbers(client):
    extra = {"return_token_ids": True, "return_tokens_as_token_ids": True, "request_id": "mine"}
    options = {"model": "fake", "prompt": "hi", "logprobs": 1, "extra_body": extra}
    completion = client.completions.create(**options)
    choice = completion.choices[0]
    assert completion.id == "cmpl-mine"
    assert (choice.prompt_token_ids, choice.token_ids) == ([256, 104, 105], [104, 105, 257])
    assert choice.logprobs.tokens == ["token_id:104", "token_id:105", "token_id:257"]
    assert set(choice.logprobs.top_logprobs[0]) == {"token_id:104", "token_id:0"}
    chunks = [chunk.choices[0] for chunk in client.completions.create(stream=True, **options)]
    assert [t for chunk in chunks for t in chunk.token_ids] == choice.token_ids
    assert chunks[0].prompt_token_ids == choice.prompt_token_ids
    assert all(getattr(chunk, "prompt_token_ids", None) is None for chunk in chunks[1:])


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"truncate_prompt_tokens": 2}, [100, 101]),
        ({"truncate_prompt_tokens": 2, "truncation_side": "right"}, [256, 97]),
        ({"truncate_prompt_tokens": 99}, [256, 97, 98, 99, 100, 101]),
        ({"truncate_prompt_tokens": -1}, [256, 97, 98, 99, 100, 101]),
        ({"truncate_prompt_tokens": -1, "max_tokens": 1021}, [99, 100, 101]),
    ],
)
def test_what_is_kept_of_a_prompt(client, fields, kept):
    completion = client.completions.create(
        model="fake", prompt="abcde", extra_body={**fields, "return_token_ids": True}
    )
    assert completion.choices[0].prompt_token_ids == kept


def test_special_tokens_around_the_prompt_can_be_left_out(client):
    completion = client.completions.create(
        model="fake", prompt="hello", extra_body={"add_special_tokens": False}
    )
    assert completion.usage.prompt_tokens == 5


def test_streamed_pieces_add_up_with_one_usage_at_the_end(client):
    chunks = list(
        client.completions.create(
            model="fake",
            prompt="long",
            max_tokens=60,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *pieces, last = chunks
    assert "".join(chunk.choices[0].text for chunk in pieces) == (ALPHABET * 3)[:60]
    assert all(chunk.usage is None for chunk in pieces)
    assert [c.choices[0].finish_reason for c in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert last.choices == []
    assert last.usage.completion_tokens == 60
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_without_usage_names_none_and_ends_with_done(server):
    body = {"model": "fake", "prompt": "hé", "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    assert not any("usage" in line for line in lines)


def test_streams_of_several_prompts_keep_their_index(client):
    texts = ["", "", "", ""]
    for chunk in client.completions.create(model="fake", prompt=["one", "two"], n=2, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["one", "one", "two", "two"]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_have_an_entry_per_token(client, stream):
    options = {"model": "fake", "prompt": "abc", "logprobs": 2, "stream": stream}
    answer = client.completions.create(**options)
    parts = [chunk.choices[0].logprobs for chunk in answer] if stream else [
        answer.choices[0].logprobs
    ]  # fmt: skip
    tokens = [token for part in parts for token in part.tokens]
    assert tokens == ["a", "b", "c", "</s>"]
    assert [x for part in parts for x in part.token_logprobs] == [-0.5] * 4
    assert [x for part in parts for x in part.text_offset] == [0, 1, 2, 3]
    tops = [top for part in parts for top in part.top_logprobs]
    assert tops[0] == {"a": -0.5, "\x00": -1.0, "\x01": -2.0}


@pytest.mark.parametrize("stream", [False, True])
def test_echo_puts_the_prompt_first(client, stream):
    options = {"model": "fake", "prompt": "abc", "echo": True, "logprobs": 1, "stream": stream}
    answer = client.completions.create(**options)
    choices = [chunk.choices[0] for chunk in answer] if stream else [answer.choices[0]]
    assert "".join(choice.text for choice in choices) == "abcabc"
    tokens = [token for choice in choices for token in choice.logprobs.tokens]
    assert tokens == ["<s>", "a", "b", "c", "a", "b", "c", "</s>"]
    assert choices[0].logprobs.token_logprobs[0] is None
    assert choices[0].logprobs.top_logprobs[0] is None
    assert choices[0].logprobs.token_logprobs[1] == -0.5


def test_echo_of_token_ids_without_generation_scores_the_prompt(client):
    completion = client.completions.create(
        model="fake", prompt=[97, 98], echo=True, max_tokens=0, logprobs=0
    )
    (choice,) = completion.choices
    assert choice.text == "ab"
    assert choice.logprobs.tokens == ["a", "b"]
    assert choice.logprobs.token_logprobs == [None, -0.5]
    assert completion.usage.completion_tokens == 0


def test_prompt_logprobs(client):
    completion = client.completions.create(
        model="fake", prompt=[97, 98], extra_body={"prompt_logprobs": 1}
    )
    first, second = completion.choices[0].prompt_logprobs
    assert first is None
    assert second["98"] == {"logprob": -0.5, "rank": 7, "decoded_token": "b"}


def test_an_adapter_is_chosen_by_its_name(client, server):
    name = 'loraplex_requests_total{adapter="poet"}'
    before = server.metric(name)
    completion = client.completions.create(model="poet", prompt="hello")
    assert (completion.model, completion.choices[0].text) == ("poet", "hello")
    assert server.metric(name) == before + 1
