"""OpenAI's API on the real model, through the official client."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Literal

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field
from real_server import serving

from loraplex import EngineConfig

MODEL = EngineConfig().model
ASK = [{"role": "user", "content": "Tell me about a person."}]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving({}) as url:
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
