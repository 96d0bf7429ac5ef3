"""Programs that speak OpenAI's API, unchanged, against the real server. Their packages are the
group `clients`, which `make test-slow` installs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from oracle import Oracle
from pydantic import BaseModel, Field
from real_server import serving
from transformers import AutoTokenizer

from loraplex import EngineConfig

MODEL = EngineConfig().model
QUESTION = "What is the capital of France?"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving({}) as url:
        yield f"{url}/v1"


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=12)
    country: str = Field(max_length=12)


async def test_langchain(url):
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(model=MODEL, base_url=url, api_key="none", temperature=0, max_tokens=24)
    answer = await model.ainvoke(QUESTION)
    assert "Paris" in answer.content
    assert answer.usage_metadata["output_tokens"] > 3
    pieces = [piece.content async for piece in model.astream(QUESTION)]
    assert "".join(pieces) == answer.content and len(pieces) > 3
    scored = await model.bind(logprobs=True, top_logprobs=2).ainvoke(QUESTION)
    logprobs = scored.response_metadata["logprobs"]["content"]
    assert "".join(entry["token"] for entry in logprobs).startswith(answer.content)
    city = await model.with_structured_output(City, method="json_schema").ainvoke(QUESTION)
    assert isinstance(city, City) and len(city.name) <= 12


def test_litellm(url):
    import litellm

    options = {"api_base": url, "api_key": "none", "temperature": 0, "max_tokens": 24}
    messages = [{"role": "user", "content": QUESTION}]
    answer = litellm.completion(f"openai/{MODEL}", messages, **options)
    assert "Paris" in answer.choices[0].message.content
    stream = litellm.completion(f"openai/{MODEL}", messages, stream=True, **options)
    text = "".join(piece.choices[0].delta.content or "" for piece in stream)
    assert text == answer.choices[0].message.content
    embedding = litellm.embedding(
        f"openai/{MODEL}", input=["a", "b"], api_base=url, api_key="none", encoding_format="float"
    )
    assert [len(d["embedding"]) for d in embedding.data] == [576, 576]


def test_lm_eval(url, model_path, tmp_path):
    """A task of two questions, whose choices' log-likelihoods come by echo and logprobs."""
    import lm_eval

    documents = [
        {"question": "The capital of France is", "choices": ["Paris", "a green bottle"], "gold": 0},
        {"question": "Two plus two is", "choices": ["purple", "four"], "gold": 1},
    ]
    file = tmp_path / "questions.json"
    file.write_text("\n".join(map(json.dumps, documents)))
    task = {
        "task": "two_questions",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}],
    }
    results = lm_eval.simple_evaluate(
        "local-completions",
        model_args={"model": MODEL, "base_url": f"{url}/completions", "tokenizer": str(model_path)},
        tasks=[task],
        bootstrap_iters=0,
    )
    assert results["results"]["two_questions"]["acc,none"] == 1.0
    tokenizer, oracle = AutoTokenizer.from_pretrained(model_path), Oracle(model_path, {})
    for document, sample in zip(documents, results["samples"]["two_questions"], strict=True):
        for choice, (found,) in zip(document["choices"], sample["resps"], strict=True):
            prompt = tokenizer.encode(document["question"])
            output = tokenizer.encode(" " + choice)
            expected = sum(oracle.score(prompt, output, None).logprobs)
            assert float(found[0]) == pytest.approx(expected, abs=1e-2)


def test_guidellm(url, model_path, tmp_path):
    report = tmp_path / "report.json"
    run = subprocess.run(
        [sys.executable, "-m", "guidellm", "run", "--disable-console",
         "--backend", f"kind=openai_http,target={url.removesuffix('/v1')},model={MODEL}",
         "--tokenizer", f"kind=huggingface_auto,model={model_path}",
         "--profile", "kind=synchronous",
         "--constraint", "kind=max_requests,count=3",
         "--data", "kind=synthetic_text,prompt_tokens=16,output_tokens=8",
         "--output", f"kind=json,path={report}"],
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    (benchmark,) = json.loads(Path(report).read_text())["benchmarks"]
    finished = benchmark["requests"]["successful"]
    assert len(finished) == 3, benchmark["requests"]["errored"][:1]
    assert all(request["output_metrics"]["text_tokens"] == 8 for request in finished)
