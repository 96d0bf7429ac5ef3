"""POST /v1/chat/completions through the official client."""

from __future__ import annotations

import openai
import pytest

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
LONG = [{"role": "user", "content": "long"}]


def ask(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def test_message_usage_and_finish_reason(client):
    answer = client.chat.completions.create(model="fake", messages=ask("hi"))
    (choice,) = answer.choices
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert choice.message.role == "assistant"
    assert choice.message.content == "user: hiassistant: "
    assert (choice.finish_reason, choice.logprobs) == ("stop", None)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_roles_names_and_text_parts_reach_the_template(client):
    answer = client.chat.completions.create(
        model="fake",
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "name": "ann", "content": [{"type": "text", "text": "a"},
                                                        {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None},
        ],
    )  # fmt: skip
    assert answer.choices[0].message.content == "system: be briefuser: a\nbassistant: cassistant: "


def test_template_options(client):
    answer = client.chat.completions.create(
        model="fake",
        messages=ask("hi"),
        extra_body={
            "add_generation_prompt": False,
            "chat_template_kwargs": {"system": "S."},
        },
    )
    assert answer.choices[0].message.content == "S.user: hi"


def test_a_template_of_the_requests_own(client):
    answer = client.chat.completions.create(
        model="fake",
        messages=ask("hi"),
        extra_body={
            "chat_template": "{{ documents }} ",
            "documents": [{"text": "One."}],
            "continue_final_message": False,
        },
    )
    assert answer.choices[0].message.content == "{{ documents }} One., user: hiassistant: "


def test_tokens_of_a_chat_in_numbers(client):
    options = {
        "model": "fake", "messages": ask("hi"), "max_tokens": 5, "logprobs": True,
        "extra_body": {"return_token_ids": True, "return_tokens_as_token_ids": True},
    }  # fmt: skip
    answer = client.chat.completions.create(**options)
    choice = answer.choices[0]
    assert answer.prompt_token_ids[:3] == [256, 258, ord("u")]
    assert choice.token_ids == list(b"user:")
    assert [t.token for t in choice.logprobs.content][:2] == ["token_id:117", "token_id:115"]
    chunks = list(client.chat.completions.create(stream=True, **options))
    assert chunks[0].prompt_token_ids == answer.prompt_token_ids
    assert [t for chunk in chunks for t in chunk.choices[0].token_ids] == choice.token_ids


def test_without_max_tokens_the_model_length_is_the_limit(client):
    answer = client.chat.completions.create(model="fake", messages=LONG)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens == 1024


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_both_names_of_the_limit(client, name):
    answer = client.chat.completions.create(model="fake", messages=LONG, **{name: 3})
    assert answer.choices[0].message.content == "abc"


def test_n_choices(client):
    answer = client.chat.completions.create(model="fake", messages=LONG, n=3, max_tokens=2)
    assert [(c.index, c.message.content) for c in answer.choices] == [
        (0, "ab"),
        (1, "ab"),
        (2, "ab"),
    ]


async def test_stream_with_the_asynchronous_client(server):
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        stream = await client.chat.completions.create(
            model="fake",
            messages=LONG,
            n=2,
            max_tokens=40,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
    *pieces, last = chunks
    for index in range(2):
        own = [c.choices[0] for c in pieces if c.choices[0].index == index]
        assert [choice.delta.role for choice in own] == ["assistant"] + [None] * (len(own) - 1)
        assert "".join(choice.delta.content for choice in own) == (ALPHABET * 2)[:40]
        assert own[-1].finish_reason == "length"
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)
    assert all(chunk.usage is None for chunk in pieces)
    assert (last.choices, last.usage.completion_tokens) == ([], 80)


def test_a_stream_ends_with_its_finish_reason(client):
    chunks = list(client.chat.completions.create(model="fake", messages=ask("x"), stream=True))
    assert [c.choices[0].finish_reason for c in chunks][-1] == "stop"
    assert all("usage" not in chunk.model_fields_set for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(client, stream):
    answer = client.chat.completions.create(
        model="fake", messages=LONG, max_tokens=3, logprobs=True, top_logprobs=2, stream=stream
    )
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    content = [entry for choice in choices for entry in choice.logprobs.content]
    assert [entry.token for entry in content] == ["a", "b", "c"]
    assert [entry.bytes for entry in content] == [[97], [98], [99]]
    assert content[0].logprob == -0.5
    assert [(t.token, t.logprob) for t in content[0].top_logprobs] == [("\x00", -1), ("\x01", -2)]


def test_logprobs_without_top(client):
    answer = client.chat.completions.create(
        model="fake", messages=LONG, max_tokens=1, logprobs=True
    )
    (entry,) = answer.choices[0].logprobs.content
    assert (entry.token, entry.top_logprobs) == ("a", [])


def test_fields_that_ask_for_nothing_are_accepted(client):
    client.chat.completions.create(
        model="fake",
        messages=ask("x"),
        user="ann",
        metadata={"a": "b"},
        store=True,
        service_tier="auto",
        tools=[],
        tool_choice="none",
        parallel_tool_calls=True,
        response_format={"type": "text"},
        temperature=None,
        extra_body={"priority": 0, "echo": False, "truncate_prompt_tokens": None},
    )
