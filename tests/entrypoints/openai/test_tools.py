"""Tools and reasoning in chats, through the official client. The engine echoes the prompt, so that
what a user says comes back as if the model had written it."""

from __future__ import annotations

import json

import openai
import pytest

ARGUMENTS = '{"x": [1, "}"]}'
CALL = f'<tool_call>\n{{"name": "add", "arguments": {ARGUMENTS}}}\n</tool_call>'
NOW = '<tool_call>{"name": "now"}</tool_call>'
SCHEMA = {"type": "object", "properties": {"x": {"type": "array"}}, "required": ["x"]}
TOOLS = [
    {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now"}},
]


def ask(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def calls_of(message) -> list[tuple[str, str]]:
    assert all(call.type == "function" for call in message.tool_calls)
    assert len({call.id for call in message.tool_calls}) == len(message.tool_calls)
    return [(call.function.name, call.function.arguments) for call in message.tool_calls]


def test_calls_of_an_answer(client):
    answer = client.chat.completions.create(
        model="fake", messages=ask(f"Hm. {CALL}\n{NOW}"), tools=TOOLS, n=2
    )
    for choice in answer.choices:
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == "add, now, user: Hm. assistant: "
        assert calls_of(choice.message) == [("add", ARGUMENTS), ("now", "{}")]


def test_calls_of_a_stream(client):
    with client.chat.completions.stream(
        model="fake", messages=ask(f"Hm. {CALL}{NOW}"), tools=TOOLS
    ) as stream:
        pieces = [e.arguments_delta for e in stream if e.type.endswith("arguments.delta")]
        answer = stream.get_final_completion()
    assert "".join(pieces) == ARGUMENTS + "{}" and len(pieces) > 5
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "add, now, user: Hm. assistant: "
    assert calls_of(choice.message) == [("add", ARGUMENTS), ("now", "{}")]


def test_without_tools_or_with_none_to_choose_calls_are_text(client):
    for options in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        answer = client.chat.completions.create(model="fake", messages=ask(CALL), **options)
        message = answer.choices[0].message
        assert message.tool_calls is None
        assert message.content == f"user: {CALL}assistant: "


def test_calls_and_their_results_reach_the_template(client):
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": ARGUMENTS}}
    messages = [
        *ask("sum"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
    ]
    answer = client.chat.completions.create(model="fake", messages=messages, tools=TOOLS)
    expected = f"user: sumassistant: add {json.loads(ARGUMENTS)}tool: 3assistant: "
    assert answer.choices[0].message.content == f"add, now, {expected}"


def test_counts_in_every_chunk(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    for pieces in (
        client.chat.completions.create(
            model="fake", messages=ask("hi"), stream=True, stream_options=options
        ),
        client.completions.create(model="fake", prompt="hi", stream=True, stream_options=options),
    ):
        counts = [piece.usage.completion_tokens for piece in pieces]
        assert counts == sorted(counts) and counts[0] < counts[-1]


def test_reasoning_is_set_apart(client):
    messages = [{"role": "assistant", "content": "x"}]
    options = {
        "add_generation_prompt": False,
        "chat_template_kwargs": {"system": "<think>why</think>\n\n"},
    }
    answer = client.chat.completions.create(model="fake", messages=messages, extra_body=options)
    message = answer.choices[0].message
    assert (message.reasoning, message.content) == ("why", "assistant: x")
    pieces = client.chat.completions.create(
        model="fake", messages=messages, stream=True, extra_body=options
    )
    deltas = [piece.choices[0].delta for piece in pieces]
    assert "".join(getattr(d, "reasoning", None) or "" for d in deltas) == "why"
    assert "".join(d.content or "" for d in deltas) == "assistant: x"
    answer = client.chat.completions.create(
        model="fake", messages=messages, extra_body={**options, "include_reasoning": False}
    )
    assert not hasattr(answer.choices[0].message, "reasoning")
    assert answer.choices[0].message.content == "assistant: x"


def test_an_answer_may_begin_within_the_reasoning(client):
    answer = client.chat.completions.create(
        model="fake",
        messages=[{"role": "user", "content": "why</think>so<think>"}],
        extra_body={"add_generation_prompt": False},
    )
    message = answer.choices[0].message
    assert (message.reasoning, message.content) == ("user: why", "so<think>")


NAMED = {"type": "function", "function": {"name": "rm"}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tool_choice": "required"}, "tool_choice is only allowed with tools"),
        ({"tools": TOOLS, "tool_choice": NAMED}, "tool_choice='rm' must be one of"),
        ({"tools": TOOLS + TOOLS[:1]}, "tools must have different names"),
        ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}},
         "tool_choice is not allowed together with response_format"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters":
         {"properties": {"x": {"not": {}}}}}}], "tool_choice": "required"},
         "tools.a is not allowed: at $.properties.x, not is not supported"),
    ],
)  # fmt: skip
def test_mistakes_are_named(client, options, message):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="fake", messages=ask("hi"), **options)
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "assistant"}], "content is missing"),
        ([{"role": "user", "content": "a", "tool_calls": [
            {"id": "1", "function": {"name": "a", "arguments": "{}"}}]}], "role='assistant'"),
        ([{"role": "assistant", "tool_calls": [
            {"id": "1", "function": {"name": "a", "arguments": "[1]"}}]}], "must be JSON of an"),
    ],
)  # fmt: skip
def test_mistakes_in_messages_are_named(client, messages, message):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="fake", messages=messages)
    assert message in caught.value.message
