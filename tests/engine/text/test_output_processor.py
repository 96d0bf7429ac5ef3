"""What users get of the core's outputs: text, stops, log-probabilities, metrics, errors."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from fakes import EOS, ByteTokenizer

from loraplex.engine.errors import RequestError
from loraplex.engine.lora_request import LoRARequest
from loraplex.engine.messages import (
    AdapterWait,
    EngineOutput,
    FinishReason,
    ModelInfo,
    TokenLogprobs,
)
from loraplex.engine.outputs import Logprob
from loraplex.engine.sampling_params import SamplingParams
from loraplex.engine.text.input_processor import InputProcessor
from loraplex.engine.text.output_processor import OutputProcessor

MODEL = ModelInfo(
    model_name="m",
    tokenizer_path="",
    max_model_len=99,
    vocab_size=259,
    eos_token_ids=[EOS],
    dtype="float32",
    device="cpu",
)


class Front:
    """An OutputProcessor and the requests it is told of."""

    def __init__(self, tokenizer=None):
        self.tokenizer = tokenizer
        self.processor = OutputProcessor(tokenizer)
        self.inputs = InputProcessor(MODEL, tokenizer, 0)

    def add(self, request_id="r", stream=True, prompt=(1, 2, 3), lora_request=None, **params):
        params = SamplingParams(**{"max_tokens": None, **params})
        requests = self.inputs.process(request_id, list(prompt), params, lora_request)
        assert self.processor.add_request("prompt", requests, stream) == request_id

    def step(self, *outputs):
        return self.processor.process_outputs(list(outputs))


def give(tokens, request_id="r", finish=None, **fields):
    tokens = list(tokens.encode()) if isinstance(tokens, str) else list(tokens)
    return EngineOutput(request_id=request_id, new_token_ids=tokens, finish_reason=finish, **fields)


def test_streaming_text_grows_and_earlier_outputs_stay_as_they_were():
    front = Front(ByteTokenizer())
    front.add(logprobs=0)
    scores = [TokenLogprobs([104], [-1.0], [1])]
    given = [
        front.step(give("h", logprobs=scores)),
        front.step(give([0xC3], logprobs=scores)),
        front.step(give([0xA9], logprobs=scores)),
        front.step(give([EOS], finish=FinishReason.STOP, logprobs=scores)),
    ]
    outputs = [processed.request_outputs[0] for processed in given]
    assert [o.outputs[0].text for o in outputs] == ["h", "h", "hé", "hé"]
    assert [len(o.outputs[0].token_ids) for o in outputs] == [1, 2, 3, 4]
    assert [len(o.outputs[0].logprobs) for o in outputs] == [1, 2, 3, 4]
    assert [o.finished for o in outputs] == [False, False, False, True]
    assert [o.outputs[0].finish_reason for o in outputs] == [None, None, None, "stop"]
    assert outputs[-1].outputs[0].stop_reason is None
    assert not any(processed.aborts for processed in given)
    assert (outputs[0].prompt, outputs[0].prompt_token_ids) == ("prompt", [1, 2, 3])


def test_without_streaming_the_end_comes_alone_and_text_is_made_once():
    tokenizer = ByteTokenizer()
    front = Front(tokenizer)
    front.add(stream=False)
    for _ in range(50):
        assert front.step(give("é")).request_outputs == []
    assert tokenizer.num_decoded_tokens == 0
    (output,) = front.step(give("!", finish=FinishReason.LENGTH)).request_outputs
    assert tokenizer.num_decoded_tokens == 101
    assert output.finished
    assert output.outputs[0].text == "é" * 50 + "!"
    assert output.outputs[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [True, False])
def test_a_stop_string_ends_the_request_at_the_token_that_completes_it(stream):
    front = Front(ByteTokenizer())
    front.add(stream=stream, stop=["END"], logprobs=0)
    shown = []
    for character in "so EN":
        scores = [TokenLogprobs([ord(character)], [-1.0], [1])]
        processed = front.step(give(character, logprobs=scores))
        shown += [o.outputs[0].text for o in processed.request_outputs]
    assert shown == (["s", "so", "so ", "so ", "so "] if stream else [])
    scores = [TokenLogprobs([1], [-1.0], [1])] * 3
    processed = front.step(give("D, a", logprobs=scores))
    (output,) = processed.request_outputs
    completion = output.outputs[0]
    assert processed.aborts == ["r"]
    assert output.finished
    assert (completion.text, completion.finish_reason) == ("so ", "stop")
    assert completion.stop_reason == "END"
    assert completion.token_ids == list(b"so END")
    assert len(completion.logprobs) == 6
    assert completion.cumulative_logprob == -6.0
    later = front.step(give("x"), give([], finish=FinishReason.ABORT))
    assert (later.request_outputs, later.aborts) == ([], []), "nobody waits for it any more"


def test_nothing_to_abort_where_the_core_has_finished_too():
    front = Front(ByteTokenizer())
    front.add(stop="b", include_stop_str_in_output=True)
    processed = front.step(give("ab", finish=FinishReason.LENGTH))
    assert processed.aborts == []
    completion = processed.request_outputs[0].outputs[0]
    assert (completion.text, completion.finish_reason, completion.stop_reason) == (
        "ab",
        "stop",
        "b",
    )


def test_text_held_back_comes_out_at_the_end():
    front = Front(ByteTokenizer())
    front.add(stop="ENDE")
    (output,) = front.step(give("xEND")).request_outputs
    assert output.outputs[0].text == "x"
    (output,) = front.step(give([0xC3], finish=FinishReason.LENGTH)).request_outputs
    assert output.outputs[0].text == "xEND\ufffd"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("params", "text"),
    [({}, "a"), ({"include_stop_str_in_output": True}, "a;")],
)
def test_stop_token_is_no_text_unless_wanted(stream, params, text):
    front = Front(ByteTokenizer())
    front.add(stream=stream, stop_token_ids=[ord(";")], skip_special_tokens=False, **params)
    processed = front.step(give("a;", finish=FinishReason.STOP, stop_reason=ord(";")))
    completion = processed.request_outputs[0].outputs[0]
    assert completion.text == text
    assert completion.token_ids == list(b"a;")
    assert completion.stop_reason == ord(";")


def test_completions_of_one_prompt_come_as_one_output():
    front = Front(ByteTokenizer())
    front.add(n=2, stop="!")
    (output,) = front.step(give("a", "r#0"), give("b", "r#1")).request_outputs
    assert [c.text for c in output.outputs] == ["a", "b"]
    processed = front.step(give("!", "r#0"), give("c", "r#1"))
    assert processed.aborts == ["r#0"]
    (output,) = processed.request_outputs
    assert not output.finished
    (output,) = front.step(give([], "r#1", FinishReason.LENGTH)).request_outputs
    assert output.finished
    assert output.request_id == "r"
    assert [(c.index, c.text, c.finish_reason) for c in output.outputs] == [
        (0, "a", "stop"),
        (1, "bc", "length"),
    ]


def test_request_ids_may_have_the_mark_of_completions_in_them():
    front = Front()
    front.add("a#1")
    front.add("b#1", n=2)
    assert front.step(give([1], "a#1", FinishReason.LENGTH)).request_outputs[0].request_id == "a#1"
    assert front.processor.abort_request("b#1") == ["b#1#0", "b#1#1"]


def test_logprobs_name_the_tokens():
    front = Front(ByteTokenizer())
    front.add(logprobs=2, prompt_logprobs=1)
    (output,) = front.step(
        give(
            "c",
            logprobs=[TokenLogprobs([99, 97, 99], [-2.0, -0.25, -2.0], [2, 1, 2])],
            prompt_logprobs=[
                TokenLogprobs([2, EOS], [-3.0, -0.5], [9, 1]),
                TokenLogprobs([3, 3], [-0.1, -0.1], [1, 1]),
            ],
        )
    ).request_outputs
    assert output.outputs[0].logprobs == [{99: Logprob(-2.0, 2, "c"), 97: Logprob(-0.25, 1, "a")}]
    assert output.outputs[0].cumulative_logprob == -2.0
    assert output.prompt_logprobs == [
        None,
        {2: Logprob(-3.0, 9, "\x02"), EOS: Logprob(-0.5, 1, "</s>")},
        {3: Logprob(-0.1, 1, "\x03")},
    ]


def test_no_text_without_a_tokenizer_or_where_it_is_not_wanted():
    for front, params in ((Front(), {}), (Front(ByteTokenizer()), {"detokenize": False})):
        front.add(**params)
        (output,) = front.step(give("ab", finish=FinishReason.LENGTH)).request_outputs
        assert output.outputs[0].text == ""
        assert output.outputs[0].token_ids == [97, 98]
        assert output.outputs[0].logprobs is None
        assert output.outputs[0].cumulative_logprob is None


def test_an_error_is_the_requests_own():
    front = Front(ByteTokenizer())
    lora_request = LoRARequest("a", "/a")
    front.add("bad", stream=False, lora_request=lora_request)
    front.add("good", stream=False)
    processed = front.step(
        give([], "bad", FinishReason.ERROR, error="does not fit", error_status=400),
        give("ok", "good", FinishReason.LENGTH),
    )
    bad, good = processed.request_outputs
    assert isinstance(bad.error, RequestError)
    assert (str(bad.error), bad.error.status) == ("does not fit", 400)
    assert (bad.finished, bad.outputs[0].finish_reason) == (True, "error")
    assert bad.lora_request is lora_request
    assert (good.error, good.outputs[0].text) == (None, "ok")
    assert processed.aborts == []


def test_metrics_say_when_and_cached_tokens_how_many():
    before = time.monotonic()
    front = Front(ByteTokenizer())
    front.add(n=2)
    front.step(give("a", "r#0", num_cached_tokens=2, first_scheduled_time=before + 1e-3))
    front.step(give("a", "r#1", num_cached_tokens=3, first_scheduled_time=before + 2e-3))
    front.step(give("b", "r#0", FinishReason.LENGTH))
    (output,) = front.step(give("b", "r#1", FinishReason.LENGTH)).request_outputs
    metrics = output.metrics
    assert metrics.first_scheduled_time == before + 1e-3
    assert before <= metrics.arrival_time <= metrics.first_token_time <= metrics.finished_time
    assert metrics.finished_time <= time.monotonic()
    assert output.num_cached_tokens == 2, "of the prompt, not of the first completion's copy of it"


def test_a_stream_says_from_its_first_token_what_it_waited_for():
    front = Front(ByteTokenizer())
    front.add()
    wait = AdapterWait(download=3.0, host_load=2.0, copy=1.0)
    (first,) = front.step(give("a", first_scheduled_time=9.0, adapter_wait=wait)).request_outputs
    (last,) = front.step(give("b", finish=FinishReason.LENGTH)).request_outputs
    assert (first.metrics.download_seconds, first.metrics.copy_seconds) == (3.0, 1.0)
    assert replace(last.metrics, finished_time=0.0) == first.metrics


def test_aborted_requests_are_forgotten():
    front = Front(ByteTokenizer())
    front.add(n=2)
    front.step(give("x", "r#0", FinishReason.LENGTH))
    assert front.processor.abort_request("r") == ["r#1"]
    assert front.processor.abort_request("r") == []
    assert front.step(give("x", "r#1")).request_outputs == []


def test_an_abort_of_the_core_ends_a_request():
    front = Front(ByteTokenizer())
    front.add()
    (output,) = front.step(give([], finish=FinishReason.ABORT)).request_outputs
    assert (output.finished, output.outputs[0].finish_reason) == (True, "abort")
