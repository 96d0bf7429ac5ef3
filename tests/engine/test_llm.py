"""The offline API on a core without a model: forms of input, order, errors, interruption."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import BOS, EOS, ByteTokenizer, FakeCore

from loraplex.engine.config import EngineConfig
from loraplex.engine.errors import RequestError
from loraplex.engine.llm import LLM
from loraplex.engine.lora_request import LoRARequest
from loraplex.engine.sampling_params import SamplingParams

LONG = SamplingParams(max_tokens=None)
GOOD = LoRARequest("good", "/adapters/good")
MISSING = LoRARequest("missing", "/adapters/missing")
BROKEN = LoRARequest("broken", "/adapters/broken")


@pytest.fixture
def core():
    return FakeCore()


@pytest.fixture
def llm(core):
    """The core must be left as it was found."""
    llm = LLM.from_core(core, ByteTokenizer())
    yield llm
    core.on_step = lambda: None
    while core.has_unfinished_requests():
        assert not core.requests
        core.step()
    llm.check_integrity()


def texts(outputs):
    return [output.outputs[0].text for output in outputs]


def generate(llm, prompts, params=LONG, **options):
    return llm.generate(prompts, params, use_tqdm=False, **options)


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("hello", ["hello"]),
        ([104, 105], ["hi"]),
        ({"prompt": "hi"}, ["hi"]),
        ({"prompt_token_ids": [104, 105]}, ["hi"]),
        (["a", "b"], ["a", "b"]),
        ([[97], [98, 99]], ["a", "bc"]),
        (["a", [98], {"prompt": "c"}, {"prompt_token_ids": [100]}], ["a", "b", "c", "d"]),
        (("a", "b"), ["a", "b"]),
        ([], []),
    ],
)
def test_forms_of_prompts(llm, prompts, expected):
    assert texts(generate(llm, prompts)) == expected


def test_outputs_are_whole_and_in_the_order_of_the_prompts(llm):
    # Short ones finish first; more of them than run at once.
    prompts = ["x" * ((7 * i) % 23 + 1) for i in range(40)]
    outputs = generate(llm, prompts, lora_request=[GOOD if i % 3 else None for i in range(40)])
    assert texts(outputs) == prompts
    assert [o.prompt for o in outputs] == prompts
    assert len({o.request_id for o in outputs}) == 40
    for i, output in enumerate(outputs):
        assert output.finished
        assert output.error is None
        assert output.prompt_token_ids == [BOS, *prompts[i].encode()]
        assert output.outputs[0].token_ids == [*prompts[i].encode(), EOS]
        assert output.outputs[0].finish_reason == "stop"
        assert output.lora_request == (GOOD if i % 3 else None)


def test_default_parameters_are_those_of_sampling_params(llm):
    (output,) = llm.generate("a long prompt, longer than 16", use_tqdm=False)
    assert (output.outputs[0].text, output.outputs[0].finish_reason) == (
        "a long prompt, l",
        "length",
    )


def test_parameters_for_each_prompt(llm):
    params = [SamplingParams(max_tokens=1), SamplingParams(max_tokens=2, n=2)]
    first, second = generate(llm, ["abc", "abc"], params)
    assert texts([first]) == ["a"]
    assert [c.text for c in second.outputs] == ["ab", "ab"]


def test_stop_strings_end_requests_in_the_core_too(llm, core):
    params = SamplingParams(stop=", ", max_tokens=None)
    (output,) = generate(llm, "well, all of this is never generated", params)
    assert (output.outputs[0].text, output.outputs[0].stop_reason) == ("well", ", ")
    assert core.aborted == ["0"]
    assert core.num_steps < 10


def test_waits_for_adapters_only_while_nothing_runs(llm, core):
    generate(llm, ["some text", "abc"], lora_request=[None, GOOD])
    assert core.num_waits == 0
    generate(llm, "abc", lora_request=GOOD)
    assert core.num_waits == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"params": [LONG]}, "sampling_params of length 1 .* 2 prompts"),
        ({"lora_request": [None, None, GOOD]}, "lora_request of length 3 .* 2 prompts"),
        ({"params": {"max_tokens": 3}}, "sampling_params={'max_tokens': 3} .* SamplingParams"),
        ({"lora_request": "good"}, "lora_request='good' .* LoRARequest"),
        ({"params": SamplingParams(stop_token_ids=[999])}, "999 in stop_token_ids"),
    ],
)
def test_mistakes_are_named_before_anything_runs(llm, core, options, message):
    with pytest.raises(ValueError, match=message):
        generate(llm, ["a", "b"], **options)
    assert core.num_steps == 0
    assert core.seen == []


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["a", []], r"^prompts\[1\]: prompt=\[\] is not allowed"),
        (["a", None], r"^prompts\[1\]: prompt=None is not allowed"),
        ([[]], r"^prompt=\[\] is not allowed"),
        (None, "^prompt=None is not allowed"),
        (b"ab", "^prompt=b'ab' is not allowed"),
    ],
)
def test_a_prompt_that_is_wrong_is_found_among_many(llm, prompts, message):
    with pytest.raises(ValueError, match=message):
        generate(llm, prompts)


def test_a_failed_request_raises_when_the_others_have_finished(llm, core):
    for lora_request, status in ((MISSING, 404), (BROKEN, 400)):
        core.seen.clear()
        with pytest.raises(RequestError, match=lora_request.lora_name) as caught:
            generate(llm, ["fine", "bad"], lora_request=[None, lora_request])
        assert caught.value.status == status
        assert core.requests == {}
        assert core.aborted == [], "the other one ran to its end"
    assert texts(generate(llm, "fine")) == ["fine"]


def test_errors_can_be_returned(llm):
    outputs = generate(
        llm,
        ["fine", "bad", "worse", [], "fine too"],
        lora_request=[None, MISSING, BROKEN, None, GOOD],
        return_errors=True,
    )
    assert [type(o.error) for o in outputs] == [
        type(None), RequestError, RequestError, ValueError, type(None),
    ]  # fmt: skip
    assert [o.finished for o in outputs] == [True] * 5
    assert texts([outputs[0], outputs[4]]) == ["fine", "fine too"]
    assert [o.prompt for o in outputs] == ["fine", "bad", "worse", None, "fine too"]
    assert outputs[1].lora_request is MISSING
    assert outputs[1].outputs[0].finish_reason == "error"


def test_all_completions_of_a_failed_request_fail(llm):
    params = SamplingParams(n=3, max_tokens=2)
    for lora_request in (MISSING, BROKEN):
        (output,) = generate(llm, "x", params, lora_request=lora_request, return_errors=True)
        assert [c.finish_reason for c in output.outputs] == ["error"] * 3
        assert lora_request.lora_name in str(output.error)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """As a terminal's program is: in the background of a shell interrupts are ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_waits_for_the_step_and_leaves_the_engine_usable(llm, core):
    whole_steps = []

    def interrupt():
        if core.num_steps == 3:
            os.kill(os.getpid(), signal.SIGINT)
            sum(range(1000))  # here, in the middle of the step, Python calls its handler
            whole_steps.append(core.num_steps)

    core.on_step = interrupt
    with pytest.raises(KeyboardInterrupt):
        generate(llm, ["ab", "some long text", "another"])
    assert whole_steps == [3]
    assert core.num_steps == 4
    assert core.requests == {}
    assert set(core.aborted) == {"1", "2"}
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert texts(generate(llm, ["ab", "cd"])) == ["ab", "cd"]


@pytest.mark.usefixtures("interruptible")
def test_a_second_interrupt_does_not_wait(llm, core):
    def interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")

    core.on_step = interrupt
    with pytest.raises(KeyboardInterrupt):
        generate(llm, "text")
    assert core.requests == {}


def test_a_handler_of_the_programs_own_stays(llm, core):
    seen = []
    previous = signal.signal(signal.SIGINT, lambda *_: seen.append(core.num_steps))
    try:
        core.on_step = lambda: os.kill(os.getpid(), signal.SIGINT) if core.num_steps == 2 else None
        assert texts(generate(llm, "text")) == ["text"]
        assert seen == [2]
    finally:
        signal.signal(signal.SIGINT, previous)


def test_other_threads_than_the_main_one_may_generate(llm):
    outputs = []
    thread = threading.Thread(target=lambda: outputs.extend(generate(llm, "text")))
    thread.start()
    thread.join()
    assert texts(outputs) == ["text"]


def test_threads_take_turns(llm, core):
    in_steps, most = [], 0

    def step():
        nonlocal most
        in_steps.append(threading.get_ident())
        most = max(most, len(set(in_steps)))
        time.sleep(0.001)
        in_steps.remove(threading.get_ident())

    core.on_step = step
    texts_of = {}
    threads = [
        threading.Thread(target=lambda i=i: texts_of.update({i: texts(generate(llm, [f"t{i}"]))}))
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts_of == {i: [f"t{i}"] for i in range(4)}
    assert most == 1


def test_a_failure_of_the_engine_aborts_what_runs(llm, core):
    def fail():
        if core.num_steps == 2:
            raise RuntimeError("the device is gone")

    core.on_step = fail
    with pytest.raises(RuntimeError, match="device"):
        generate(llm, ["text", "more text"])
    assert set(core.aborted) == {"0", "1"}


def test_chat_uses_the_template(llm):
    messages = [{"role": "user", "content": "hi"}]
    (output,) = llm.chat(messages, LONG, use_tqdm=False)
    assert output.prompt == "<s><turn>user: hi<turn>assistant: "
    assert output.prompt_token_ids == ByteTokenizer().apply_chat_template(messages)
    assert output.outputs[0].text == "user: hiassistant: "
    both = llm.chat(
        [messages, [{"role": "user", "content": "ho"}]],
        [LONG, SamplingParams(max_tokens=4)],
        lora_request=[GOOD, None],
        use_tqdm=False,
        add_generation_prompt=False,
        chat_template_kwargs={"system": "S"},
    )
    assert texts(both) == ["Suser: hi", "Suse"]
    assert [o.lora_request for o in both] == [GOOD, None]


def test_messages_may_come_in_parts_and_mistakes_in_them_are_named(llm, core):
    parts = [{"type": "text", "text": "hi"}, {"type": "text", "text": "you"}]
    (output,) = llm.chat([{"role": "user", "content": parts}], LONG, use_tqdm=False)
    assert output.outputs[0].text == "user: hi\nyouassistant: "
    good = [{"role": "user", "content": "hi"}]
    for bad, message in [
        ("hi", "messages='hi' is not allowed: it must be a list of messages"),
        ([], "it must be a list of messages, at least one"),
        ([{"content": "hi"}], "the message {'content': 'hi'} .* role and content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "image_url.* must be a text part"),
    ]:
        with pytest.raises(ValueError, match=rf"^messages\[1\]: .*{message}"):
            llm.chat([good, bad], LONG, use_tqdm=False)
        first, second = llm.chat([good, bad], LONG, use_tqdm=False, return_errors=True)
        assert first.error is None
        assert isinstance(second.error, ValueError)
    with pytest.raises(TypeError, match="add_generation_promt"):
        llm.chat(good, add_generation_promt=False)


def test_progress_bar_counts_requests_and_tokens(llm, capsys):
    llm.generate(["ab", "cd"], LONG)
    shown = capsys.readouterr().err
    assert "2/2" in shown
    assert "output tokens/s" in shown
    generate(llm, "ab")
    assert capsys.readouterr().err == ""


def test_without_a_tokenizer_it_works_on_token_ids(core):
    llm = LLM.from_core(core, None)
    (output,) = generate(llm, [97, 98])
    assert (output.outputs[0].token_ids, output.outputs[0].text) == ([97, 98, EOS], "")
    with pytest.raises(ValueError, match="skip_tokenizer_init"):
        llm.get_tokenizer()
    with pytest.raises(ValueError, match="skip_tokenizer_init"):
        llm.chat([{"role": "user", "content": "hi"}])


def test_seeds_make_an_engine_repeatable(core):
    for _ in range(2):
        llm = LLM.from_core(core, ByteTokenizer(), seed=7)
        generate(llm, ["a", "b"], SamplingParams(max_tokens=1))
    seeds = [request.seed for request in core.seen]
    assert seeds[:2] == seeds[2:]
    assert seeds[0] != seeds[1]


def test_life_of_an_llm(core):
    with LLM.from_core(core, ByteTokenizer()) as llm:
        assert llm.stats()["pages_total"] == 10
        assert llm.get_tokenizer().eos_token_ids == [EOS]
        assert not core.is_shut_down
    assert core.is_shut_down
    llm.shutdown()
    for use in (llm.stats, llm.check_integrity, lambda: llm.generate("a"), lambda: llm.embed("a")):
        with pytest.raises(RuntimeError, match="this LLM was shut down"):
            use()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_num_sequences": 3}, "'max_num_sequences' is not an option: did you mean max_num_s"),
        ({"colour": "red"}, "'colour' is not an option: the options are .*, max_num_seqs, "),
        ({"max_num_seqs": True}, "max_num_seqs=True is not allowed: it must be an integer"),
        ({"max_model_len": "512"}, "max_model_len='512' .* an integer or None"),
        ({"enforce_eager": None}, "enforce_eager=None .* True or False"),
        ({"adapter_roots": "/adapters"}, "adapter_roots='/adapters' .* a list of strings or None"),
        ({"gpu_memory_utilization": "0.9"}, "gpu_memory_utilization='0.9' .* a number or None"),
        ({"adapter_hub_token": 5}, r"adapter_hub_token='\.\.\.' .* a string or None"),
        ({"trust_remote_code": True}, "trust_remote_code=True .* False, since code .* never run"),
        ({"max_lora_rank": 512}, "max_lora_rank=512 .* 1 to 256"),
        ({"max_loras": "all"}, "max_loras='all' .* 1 or more"),
    ],
)
def test_wrong_options_are_named_before_a_model_is_loaded(options, message):
    with pytest.raises(ValueError, match=message):
        LLM("nowhere", **options)


def test_options_of_vllm_that_ask_for_what_happens_anyway_are_taken():
    options = {"enable_lora": True, "max_loras": 4, "max_cpu_loras": 100, "max_lora_rank": 64}
    config = EngineConfig.from_options(model=Path("some/model"), trust_remote_code=False, **options)
    assert config == EngineConfig(model="some/model")


@pytest.mark.parametrize(
    "lora_request",
    [
        LoRARequest("good", 7, "/adapters/good"),
        LoRARequest(lora_name="good", lora_int_id=7, lora_path="/adapters/good"),
        LoRARequest("good", Path("/adapters/good")),
    ],
)
def test_adapters_may_be_named_as_in_vllm(lora_request):
    assert lora_request == GOOD
    assert hash(lora_request) == hash(GOOD)
    assert lora_request.merged_adapters is None
