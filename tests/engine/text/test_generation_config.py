"""What a model directory recommends, and who honours it."""

from __future__ import annotations

import json

import pytest
from fakes import ByteTokenizer, FakeCore

from loraplex.engine.llm import LLM
from loraplex.engine.sampling_params import SamplingParams
from loraplex.engine.text.generation_config import read_default_sampling, read_eos_token_ids
from loraplex.entrypoints.openai.chat_requests import ChatCompletionRequest
from loraplex.entrypoints.openai.requests import CompletionRequest

RECOMMENDED = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}


def write(path, name, **values):
    (path / name).write_text(json.dumps(values))


def test_end_of_sequence_ids_are_those_of_all_files(tmp_path):
    assert read_eos_token_ids(tmp_path) == []
    write(tmp_path, "config.json", eos_token_id=300, text_config={"eos_token_id": [7]})
    write(tmp_path, "generation_config.json", eos_token_id=[301, 9])
    assert read_eos_token_ids(tmp_path) == [7, 9, 300, 301]


def test_recommended_sampling(tmp_path):
    assert read_default_sampling(tmp_path) == {}
    write(
        tmp_path, "generation_config.json", **RECOMMENDED, min_p=None, do_sample=True, max_length=9
    )
    assert read_default_sampling(tmp_path) == RECOMMENDED
    write(tmp_path, "generation_config.json", top_p=1.5)
    with pytest.raises(ValueError, match=r"generation_config\.json of .*top_p=1\.5 is not allowed"):
        read_default_sampling(tmp_path)


def test_the_offline_api_samples_as_recommended():
    core = FakeCore()
    core.model_info.default_sampling = RECOMMENDED
    llm = LLM.from_core(core, ByteTokenizer())
    assert llm.get_default_sampling_params() == SamplingParams(**RECOMMENDED)
    llm.generate(["a"], use_tqdm=False)
    llm.generate(["a"], SamplingParams(top_k=3), use_tqdm=False)
    recommended, own = (request.sampling_params for request in core.seen)
    assert recommended == SamplingParams(**RECOMMENDED)
    assert own == SamplingParams(top_k=3)


@pytest.mark.parametrize(
    "body",
    [
        CompletionRequest(model="m", prompt="a", top_k=3),
        ChatCompletionRequest(model="m", messages=[{"role": "user", "content": "a"}], top_k=3),
    ],
)
def test_a_request_s_own_parameters_come_before_the_recommended(body):
    params = body.sampling_params(RECOMMENDED)
    assert (params.temperature, params.top_k, params.top_p) == (0.7, 3, 0.8)
    assert body.sampling_params({}).temperature == 1.0
