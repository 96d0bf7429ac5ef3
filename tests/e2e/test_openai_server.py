"""OpenAI's API on the real model, through the official client."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Literal

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field
from real_server import serving

from loraplex import EngineConfig
from loraplex.benchmarks.synthetic_adapters import write_adapter
from loraplex.engine.models.registry import lora_spec

MODEL = EngineConfig().model
ASK = [{"role": "user", "content": "Tell me about a person."}]


# An adapter's own template, which shows tools and begins the call that the model is to go on with.
TEMPLATE = """{% for tool in tools %}{{ tool.function.name }}: {{ tool.function.parameters }}
{% endfor %}{% for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}assistant: <tool_call>
{"name": "weather", "arguments": {"city": "Oslo"}}
</tool_call>
<tool_call>
{"name": "weather", "arguments": {"city": "Rome"}}
</tool_call>
"""


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Iterator[str]:
    spec, _ = lora_spec(MODEL)
    path = write_adapter(tmp_path_factory.mktemp("adapters") / "agent", spec, rank=4, seed=1)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    with serving({"agent": str(path)}) as url:
        yield f"{url}/v1"


@pytest.fixture(scope="module")
def client(url) -> Iterator[OpenAI]:
    with OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


class Person(BaseModel):
    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=120)
    mood: Literal["glad", "sad"]


def test_a_pydantic_model_is_parsed(client):
    answer = client.chat.completions.parse(
        model=MODEL, messages=ASK, response_format=Person, temperature=0
    )
    person = answer.choices[0].message.parsed
    assert isinstance(person, Person) and person.mood in ("glad", "sad")


def test_a_stream_of_an_object(client):
    pieces = client.chat.completions.create(
        model=MODEL,
        messages=ASK,
        response_format={"type": "json_object"},
        extra_body={"repetition_penalty": 1.2},
        temperature=0,
        max_tokens=24,
        stream=True,
    )
    texts = [piece.choices[0].delta.content for piece in pieces]
    assert len(texts) > 3
    assert "".join(texts).lstrip().startswith("{")


@pytest.mark.parametrize(
    ("structure", "pattern"),
    [
        ({"choice": ["north", "south"]}, "north|south"),
        ({"regex": "[A-Z][a-z]{2,6} [0-9]{4}"}, "[A-Z][a-z]{2,6} [0-9]{4}"),
        ({"grammar": 'root ::= "(" [a-c]{1,3} ")"'}, r"\([a-c]{1,3}\)"),
        ({"json": {"type": "integer", "minimum": 10, "maximum": 99}}, "[1-9][0-9]"),
    ],
)
def test_completions_by_structured_outputs(client, structure, pattern):
    answer = client.completions.create(
        model=MODEL, prompt="Say:", n=2, seed=1, extra_body={"structured_outputs": structure}
    )
    assert all(re.fullmatch(pattern, choice.text) for choice in answer.choices)


async def test_schemas_of_many_requests_at_once_and_one_that_is_wrong(url):
    def schema(number: int) -> dict:
        field = {"type": "integer", "minimum": number, "maximum": number + 1}
        return {"type": "object", "properties": {f"f{number}": field}, "required": [f"f{number}"]}

    async def ask(client: AsyncOpenAI, number: int) -> dict:
        answer = await client.chat.completions.create(
            model=MODEL,
            messages=ASK,
            seed=number,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": schema(number), "strict": True},
            },
        )
        return json.loads(answer.choices[0].message.content)

    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        wrong = client.completions.create(
            model=MODEL, prompt="a", extra_body={"structured_outputs": {"regex": "(a"}}
        )
        *answers, error = await asyncio.gather(
            *(ask(client, number) for number in range(8)), wrong, return_exceptions=True
        )
    for number, answer in enumerate(answers):
        assert answer[f"f{number}"] in (number, number + 1)
    assert isinstance(error, openai.BadRequestError)
    assert error.param == "structured_outputs.regex"


def test_a_message_is_gone_on_with_and_templates_are_not_taken(client):
    messages = [*ASK, {"role": "assistant", "content": "One, two, three, four,"}]
    answer = client.chat.completions.create(
        model=MODEL, messages=messages, temperature=0, max_tokens=4,
        extra_body={"continue_final_message": True, "add_generation_prompt": False},
    )  # fmt: skip
    assert answer.choices[0].message.content.startswith(" five")
    with pytest.raises(openai.BadRequestError, match="--trust-request-chat-template"):
        client.chat.completions.create(
            model=MODEL, messages=ASK, extra_body={"chat_template": "{{ messages }}"}
        )


def test_the_likeliest_sequences(client):
    def ask(**fields) -> list[str]:
        answer = client.completions.create(
            model=MODEL, prompt="The capital of France is", max_tokens=6, temperature=0,
            extra_body=fields,
        )  # fmt: skip
        assert answer.usage.completion_tokens <= 6 * len(answer.choices)
        return [choice.text for choice in answer.choices]

    (greedy,) = ask()
    assert ask(use_beam_search=True, ignore_eos=True) == [greedy]
    beams = ask(use_beam_search=True, n=4, length_penalty=0.5)
    assert len(set(beams)) == 4
    assert any("Paris" in text for text in beams)
    answer = client.chat.completions.create(
        model=MODEL, messages=ASK, n=2, max_tokens=4, extra_body={"use_beam_search": True}
    )
    assert [choice.index for choice in answer.choices] == [0, 1]


def test_words_that_must_not_come_and_tokens_that_may(client):
    def ask(**fields) -> str:
        answer = client.chat.completions.create(
            model=MODEL, messages=ASK, temperature=0, max_tokens=12, extra_body=fields
        )
        return answer.choices[0].message.content

    words = ask().split()
    assert len(words) > 4
    for word in {words[0], words[3], " ".join(words[1:3])}:
        held = ask(bad_words=[word])
        assert held and word not in held
    tokens = httpx.post(
        str(client.base_url).replace("/v1/", "/tokenize"),
        json={"prompt": "0123456789", "return_token_strs": True},
    ).json()
    assert tokens["token_strs"] == list("0123456789")
    text = ask(allowed_token_ids=tokens["tokens"])
    assert re.fullmatch("[0-9]{12}", text)
    with pytest.raises(openai.BadRequestError, match="allowed_token_ids") as refusal:
        ask(allowed_token_ids=[49152])
    assert "0 to 49151" in refusal.value.message


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 10},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
        },
    },
}
TIME = {"type": "function", "function": {"name": "time"}}


def check_weather(arguments: str) -> None:
    parsed = json.loads(arguments)
    assert set(parsed) == {"city", "days"} and 1 <= parsed["days"] <= 9


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_calls_that_must_be_made(client, choice):
    answer = client.chat.completions.create(
        model="agent",
        messages=ASK,
        tools=[WEATHER, TIME],
        tool_choice=choice,
        parallel_tool_calls=False,
        temperature=0.7,
        n=2,
        seed=3,
    )
    for completion in answer.choices:
        (call,) = completion.message.tool_calls
        assert completion.finish_reason == "tool_calls"
        assert call.function.name == "weather" or choice == "required"
        if call.function.name == "weather":
            check_weather(call.function.arguments)


def test_a_stream_of_calls(client):
    with client.chat.completions.stream(
        model="agent",
        messages=ASK,
        tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "weather"}},
        temperature=0,
    ) as stream:
        num_pieces = sum(event.type.endswith("arguments.delta") for event in stream)
        message = stream.get_final_completion().choices[0].message
    assert num_pieces > 5
    check_weather(message.tool_calls[0].function.arguments)


def test_only_models_whose_template_shows_tools_are_given_them(client):
    with pytest.raises(openai.BadRequestError, match="chat template of this model knows no tools"):
        client.chat.completions.create(model=MODEL, messages=ASK, tools=[WEATHER])


def test_the_best_of_several(client):
    options = {"model": MODEL, "prompt": "The sky is", "seed": 5, "max_tokens": 4, "logprobs": 1}
    several = client.completions.create(**options, n=4)
    best = client.completions.create(**options, n=2, best_of=4)

    def mean(choice) -> float:
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    ranked = sorted(several.choices, key=mean, reverse=True)
    assert [c.text for c in best.choices] == [c.text for c in ranked[:2]]
    assert [c.index for c in best.choices] == [0, 1]
    assert best.usage.completion_tokens == several.usage.completion_tokens


def test_embeddings_in_every_form(client):
    texts = ["A cat sat.", "The stock market fell."]
    for pooling in ("last", "mean"):
        options = {"model": "agent", "extra_body": {"pooling": pooling}}
        binary = client.embeddings.create(input=texts, **options)
        plain = client.embeddings.create(input=texts, encoding_format="float", **options)
        assert [d.index for d in plain.data] == [0, 1]
        for one, other in zip(binary.data, plain.data, strict=True):
            assert one.embedding == pytest.approx(other.embedding, abs=1e-6)
            assert sum(x * x for x in one.embedding) == pytest.approx(1, abs=1e-5)
        assert plain.usage.prompt_tokens == plain.usage.total_tokens > 8
    base = client.embeddings.create(model=MODEL, input=texts[0])
    adapted = client.embeddings.create(model="agent", input=texts[0])
    assert base.data[0].embedding != adapted.data[0].embedding
    with pytest.raises(openai.BadRequestError, match="dimensions"):
        client.embeddings.create(model=MODEL, input="a", dimensions=3)
