"""Outputs that must keep to grammars, on a device without a model and in the sampler."""

from __future__ import annotations

import json
import pickle
import re
import threading
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from fake_device import (
    EOS_TOKEN_ID,
    VOCAB_SIZE,
    expected_tokens,
    fake_core,
    make_request,
    run_to_end,
    tokens_of,
)
from tiny_tokenizer import write_tokenizer
from transformers import AutoTokenizer

from loraplex.engine.core import EngineCore
from loraplex.engine.errors import RequestError
from loraplex.engine.messages import FinishReason
from loraplex.engine.runner import logits as logits_module
from loraplex.engine.runner import sampler
from loraplex.engine.runner.sampling_state import SamplingBatch, SamplingState
from loraplex.engine.sampling_params import SamplingParams
from loraplex.engine.structured_outputs import grammar
from loraplex.engine.structured_outputs.grammar import AdmittedTokens, GrammarCompiler
from loraplex.engine.structured_outputs.params import MAX_CHARACTERS, StructuredOutputsParams

WORD = StructuredOutputsParams(regex="[a-z]{3}-[0-9]{2}")


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), EOS_TOKEN_ID)


@pytest.fixture
def make_core(tokenizer_path):
    cores = []

    def make(**options) -> EngineCore:
        core = fake_core(100, tokenizer_path=str(tokenizer_path), **options)
        cores.append(core)
        return core

    yield make
    for core in cores:
        core.shutdown()


@pytest.fixture
def compile_in_turn(monkeypatch):
    """Grammars compile when this is set."""
    may_compile = threading.Event()
    compile_one = GrammarCompiler._compile

    def wait(self, *arguments):
        assert may_compile.wait(30)
        return compile_one(self, *arguments)

    monkeypatch.setattr(GrammarCompiler, "_compile", wait)
    yield may_compile
    may_compile.set()


def structured(request_id: str, structure: StructuredOutputsParams, **options):
    options = {"max_tokens": 30, **options}
    return make_request(request_id, [1, 2, 3], structured_outputs=structure, **options)


def finish(core: EngineCore) -> dict[str, list]:
    """As run_to_end, which is quicker than the compiler."""
    for compiled in core._grammars._cache.values():
        compiled.exception(30)
    return run_to_end(core)


def text_of(outputs) -> str:
    assert tokens_of(outputs)[-1] == EOS_TOKEN_ID
    return "".join(map(chr, tokens_of(outputs)[:-1]))


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_outputs_keep_to_their_grammars_beside_others(make_core, steps_ahead):
    core = make_core(steps_ahead=steps_ahead)
    plain = [make_request(f"p{i}", [5, i], max_tokens=12) for i in range(3)]
    penalised = make_request("q", [5, 9], max_tokens=12, presence_penalty=1.0)
    for request in [*plain, penalised]:
        core.add_request(request)
    for i in range(4):
        core.add_request(structured(f"s{i}", WORD, temperature=float(i), adapter="ab"[i % 2]))
    outputs = finish(core)
    for i in range(4):
        assert re.fullmatch(WORD.regex, text_of(outputs[f"s{i}"]))
        assert outputs[f"s{i}"][-1].finish_reason is FinishReason.STOP
    for request in [*plain, penalised]:
        assert tokens_of(outputs[request.request_id]) == expected_tokens(request)


def test_a_preempted_request_goes_on_where_it_was(make_core):
    core = make_core(steps_ahead=1)
    long = StructuredOutputsParams(regex="([a-z][0-9]){10}")
    requests = [structured(f"s{i}", long, max_tokens=28) for i in range(8)]
    for request in requests:
        core.add_request(request)
    for compiled in core._grammars._cache.values():
        compiled.result(30)
    outputs: dict[str, list] = {}
    for number in range(12):
        for output in core.step():
            outputs.setdefault(output.request_id, []).append(output)
        if number in (6, 9):
            core._scheduler._preempt(core._scheduler._running[-1])
    for request_id, rest in finish(core).items():
        outputs.setdefault(request_id, []).extend(rest)
    assert core.stats()["preemptions"] == 2
    for request in requests:
        assert re.fullmatch(long.regex, text_of(outputs[request.request_id]))


def test_a_compiling_request_delays_nobody_of_its_own_queue(make_core, compile_in_turn):
    core = make_core()
    core.add_request(structured("s", WORD))
    core.add_request(make_request("p", [1, 2, 3], max_tokens=4))
    outputs = []
    for _ in range(6):
        outputs += core.step()
        core.check_integrity()
    assert {o.request_id for o in outputs} == {"p"}
    assert core.stats()["num_waiting"] == 1
    compile_in_turn.set()
    assert re.fullmatch(WORD.regex, text_of(finish(core)["s"]))


def test_compiling_requests_can_be_aborted_and_can_be_late(make_core, compile_in_turn):
    core = make_core(max_queue_seconds=0.01)
    core.add_request(structured("late", WORD))
    time.sleep(0.02)
    core.add_request(structured("aborted", WORD))
    core.abort_requests(["aborted"])
    outputs = {o.request_id: o for o in core.step()}
    assert outputs["late"].error_status == 503
    assert outputs["aborted"].finish_reason is FinishReason.ABORT
    core.check_integrity()
    assert not core.has_unfinished_requests()


def test_what_can_not_be_compiled_fails_its_own_request_and_is_tried_again(make_core, monkeypatch):
    core = make_core()
    bad = StructuredOutputsParams(regex="(a")
    for request in (structured("bad", bad), structured("good", WORD)):
        core.add_request(request)
    outputs = finish(core)
    (output,) = outputs["bad"]
    assert (output.finish_reason, output.error_status) == (FinishReason.ERROR, 400)
    assert output.error.startswith("structured_outputs.regex='(a' is not allowed: Regex")
    assert re.fullmatch(WORD.regex, text_of(outputs["good"]))
    monkeypatch.setattr(GrammarCompiler, "_compile", lambda *_: 1 / 0)
    core.add_request(structured("ours", StructuredOutputsParams(regex="b")))
    (output,) = finish(core)["ours"]
    assert output.error_status == 500 and "ZeroDivisionError" in output.error


def test_a_grammar_without_a_way_on_fails_its_request(make_core):
    core = make_core()
    core.add_request(structured("s", StructuredOutputsParams(grammar='root ::= "ab" "é"')))
    core.add_request(make_request("p", [1, 2, 3], max_tokens=8))
    outputs = finish(core)
    assert tokens_of(outputs["s"]) == [ord("a"), ord("b")]
    assert outputs["s"][-1].error_status == 400
    assert "after 2 tokens nothing can follow" in outputs["s"][-1].error
    assert len(tokens_of(outputs["p"])) == 8


def test_without_an_end_of_sequence_there_is_no_structure(make_core):
    with pytest.raises(RequestError, match="no end-of-sequence token"):
        make_core().add_request(structured("s", WORD, eos_token_ids=[]))


@pytest.mark.parametrize(
    ("structure", "pattern"),
    [
        ({"choice": ["yes", 'a"b\\', "n/o"]}, r'yes|a"b\\|n/o'),
        ({"grammar": 'root ::= "x" [0-9]'}, "x[0-9]"),
        ({"json": {"enum": ["u", 7, None]}}, '"u"|7|null'),
        (
            {"json": {"type": "object", "properties": {"k": {"type": "boolean"}},
                      "required": ["k"]}, "disable_any_whitespace": True},
            r'\{"k": (true|false)\}',
        ),
        (
            {"structural_tag": {"type": "structural_tag", "format": {
                "type": "tag", "begin": "<a>", "end": "</a>",
                "content": {"type": "regex", "pattern": "[0-9]"}}}},
            "<a>[0-9]</a>",
        ),
    ],
)  # fmt: skip
def test_every_kind(make_core, structure, pattern):
    core = make_core()
    for seed in range(5):
        params = StructuredOutputsParams(**structure)
        core.add_request(structured("s" * (1 + seed), params, temperature=1))
    outputs = finish(core)
    assert len(outputs) == 5
    for of_request in outputs.values():
        assert re.fullmatch(pattern, text_of(of_request))


def test_json_objects_are_objects(tokenizer_path):
    compiler = GrammarCompiler(str(tokenizer_path), VOCAB_SIZE, lambda: None)
    found = compiler.start(StructuredOutputsParams(json_object=True), [EOS_TOKEN_ID])
    found._compiled.result()
    assert found.is_ready()
    mask = np.zeros(found.mask_words, np.int32)
    found.fill_mask(mask)
    assert np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")) == [ord("{")]
    compiler.close()


def test_special_tokens_do_not_pass_for_their_names(tmp_path):
    write_tokenizer(tmp_path, EOS_TOKEN_ID)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"pad_token": "<unused1>"})
    tokenizer.save_pretrained(tmp_path)
    compiler = GrammarCompiler(str(tmp_path), VOCAB_SIZE, lambda: None)
    found = compiler.start(StructuredOutputsParams(regex="<.*"), [EOS_TOKEN_ID])
    found._compiled.result()
    assert found.is_ready()
    mask = np.zeros(found.mask_words, np.int32)
    found.fill_mask(mask)
    admitted = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
    assert 0 in admitted and ord("<") in admitted
    assert 1 not in admitted
    compiler.close()


def test_compiled_grammars_are_remembered_up_to_a_size(tokenizer_path, monkeypatch):
    num_compiled = 0
    compile_one = GrammarCompiler._compile

    def count(self, *arguments):
        nonlocal num_compiled
        num_compiled += 1
        return compile_one(self, *arguments)

    monkeypatch.setattr(GrammarCompiler, "_compile", count)
    compiler = GrammarCompiler(str(tokenizer_path), VOCAB_SIZE, lambda: None)

    def compile_word(length: int) -> None:
        structure = StructuredOutputsParams(regex=f"a{{{length}}}")
        compiler.start(structure, [EOS_TOKEN_ID])._compiled.result()

    for length in (1, 2, 1, 2):
        compile_word(length)
    assert num_compiled == 2
    monkeypatch.setattr(grammar, "CACHE_BYTES", 0)
    for length in (3, 1):
        compile_word(length)
    assert num_compiled == 4
    compiler.close()


def admitting(token_ids: list[int], vocab_size: int) -> AdmittedTokens:
    bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    bits[token_ids] = 1
    return AdmittedTokens(np.packbits(bits, bitorder="little").view(np.int32))


def batch_of(state: SamplingState, num_rows: int) -> SamplingBatch:
    """Of these rows of a state for 16 or more requests, at their first tokens."""
    zeros = np.zeros(max(16, num_rows), np.int32)
    token_ids = np.zeros((len(zeros), 8), np.int32)
    return state.gather(np.arange(num_rows), zeros[:num_rows], token_ids, zeros, zeros)


@pytest.mark.parametrize("vocab_size", [64, 1000])
def test_only_masked_rows_are_masked(vocab_size, monkeypatch):
    """Among rows with other adjustments and none, in chunks of any size."""
    monkeypatch.setattr(logits_module, "CPU_CHUNK_ELEMENTS", 3 * vocab_size)
    state = SamplingState(16, vocab_size)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(12, vocab_size, generator=generator).bfloat16()
    best = logits.float().argmax(-1).tolist()
    for row in range(12):
        request = make_request(str(row), [1], 9, logit_bias={2: 1.0} if row % 4 == 1 else {})
        admitted = admitting([7, vocab_size - 1], vocab_size) if row % 3 == 0 else None
        state.add(row, request, admitted)
    batch = batch_of(state, 12)
    assert batch.needs_output
    token_ids = sampler.sample(logits, batch).token_ids.tolist()
    for row, token_id in enumerate(token_ids):
        if row % 3 == 0:
            assert token_id == max([7, vocab_size - 1], key=lambda t: logits[row, t])
        elif row % 4 != 1:
            assert token_id == best[row]


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 2},
        {"top_p": 0.7},
        {"min_p": 0.3},
        {"logit_bias": {6: 2.0}},
    ],
    ids=str,
)
def test_tokens_are_as_frequent_as_they_are_likely_among_the_admitted(params):
    """By definition: the mask first, and then what the parameters leave of it."""
    num_draws, admitted = 20_000, np.array([1, 3, 4, 6])
    logits = np.array([2.0, 1.0, 1.8, 0.2, -0.5, 0.9, 0.4, 1.5])
    state = SamplingState(num_draws, 8)
    for row in range(num_draws):
        request = make_request(str(row), [1], 9, **{"temperature": 1.0, **params})
        request.seed = row
        state.add(row, request, admitting(admitted.tolist(), 8))
    for token_id, bias in params.get("logit_bias", {}).items():
        logits[token_id] += bias
    probs = np.exp(logits[admitted] / params.get("temperature", 1.0))
    probs = np.sort(probs / probs.sum())[::-1]
    probs[params.get("top_k", 4) :] = 0
    probs[np.cumsum(probs) - probs >= params.get("top_p", 2.0)] = 0
    probs[probs < params.get("min_p", 0.0) * probs[0]] = 0
    expected = np.zeros(8)
    expected[admitted[np.argsort(-logits[admitted])]] = num_draws * probs / probs.sum()
    rows = torch.tensor([2.0, 1.0, 1.8, 0.2, -0.5, 0.9, 0.4, 1.5]).expand(num_draws, -1)
    token_ids = sampler.sample(rows.contiguous(), batch_of(state, num_draws)).token_ids
    counts = np.bincount(token_ids, minlength=8)
    possible = expected > 0
    assert (counts[~possible] == 0).all()
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < 22, "exceeded once in 10 000 times with 3 degrees of freedom"


def test_no_mask_is_made_for_a_token_that_is_admitted(monkeypatch):
    filled = []
    fill_mask = AdmittedTokens.fill_mask
    monkeypatch.setattr(
        AdmittedTokens,
        "fill_mask",
        lambda self, mask: (filled.append(self), fill_mask(self, mask))[1],
    )
    state = SamplingState(16, 8)
    grammars = [admitting([5], 8), admitting([3, 4], 8), admitting(list(range(8)), 8)]
    for row, admitted in enumerate(grammars):
        state.add(row, make_request(str(row), [1], 9), admitted)
    logits = torch.arange(8.0).roll(-2).expand(3, -1).contiguous()
    token_ids = sampler.sample(logits, batch_of(state, 3)).token_ids
    assert token_ids.tolist() == [5, 4, 5]
    assert filled == [grammars[1]]


def test_what_is_admitted_is_what_the_mask_has(tokenizer_path, capfd):
    """Token by token, for special ones too, and asking changes nothing."""
    compiler = GrammarCompiler(str(tokenizer_path), VOCAB_SIZE, lambda: None)
    schema = {
        "type": "object",
        "properties": {"k": {"type": "string", "maxLength": 3}, "n": {"type": "integer"}},
        "required": ["k", "n"],
    }
    followed = compiler.start(StructuredOutputsParams(json=schema), [EOS_TOKEN_ID])
    followed._compiled.result()
    assert followed.is_ready()
    mask = np.zeros(followed.mask_words, np.int32)
    for token_id in [*b'{"k": "ab", "n": -10}', EOS_TOKEN_ID]:
        followed.fill_mask(mask)
        elsewhere = pickle.loads(pickle.dumps(followed))
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[:VOCAB_SIZE]
        for asked in (followed, elsewhere):
            assert [asked.admits(t) for t in range(VOCAB_SIZE)] == bits.tolist()
        assert followed.accept(token_id)
    assert capfd.readouterr().err == ""
    compiler.close()


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        ({}, "structured_outputs=None is not allowed: it must have exactly one of json, regex"),
        (
            {"regex": "a", "json_object": True},
            "structured_outputs=regex and json_object is not allowed",
        ),
        ({"regex": ""}, "structured_outputs.regex='' is not allowed"),
        ({"regex": "a" * (MAX_CHARACTERS + 1)}, "must be at most 65536"),
        ({"choice": []}, r"structured_outputs.choice=\[\] is not allowed"),
        ({"choice": [1]}, r"structured_outputs.choice=\[1\] is not allowed"),
        ({"choice": "yes"}, "structured_outputs.choice='yes' is not allowed"),
        ({"json": "{"}, "structured_outputs.json is not allowed: it is no JSON"),
        ({"json": "[" * 5000}, "structured_outputs.json is not allowed: it is no JSON"),
        ({"json": "3"}, "structured_outputs.json='3' is not allowed: it must be a JSON object"),
        ({"json": {"a": {1}}}, "structured_outputs.json is not allowed: it is no JSON"),
    ],
)
def test_mistakes_are_named(structure, message):
    with pytest.raises(ValueError, match=message):
        StructuredOutputsParams(**structure)


def nested(depth: int) -> dict:
    return {"items": nested(depth - 1), "type": "array"} if depth else {}


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "array", "uniqueItems": True}, r"at \$, uniqueItems is not supported"),
        ({"properties": {"a": {"not": {}}}}, r"at \$.properties.a, not is not supported"),
        ({"anyOf": [{"type": "string"}, {"minLength": 1}]},
         r'at \$.anyOf\[1\], minLength without a type is not supported: add "type": "string"'),
        ({"$ref": "#/$defs/a", "required": ["b"]}, "ref is not supported together with required"),
        ({"allOf": [{}, {}]}, "allOf of more than one schema"),
        ({"type": "string", "pattern": "a", "maxLength": 3}, "pattern is not supported together"),
        (nested(64), "may be nested 64 deep"),
    ],
)  # fmt: skip
def test_schemas_that_can_not_be_kept_to_are_refused(schema, message):
    with pytest.raises(ValueError, match=f"structured_outputs.json is not allowed: .*{message}"):
        StructuredOutputsParams(json=schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"not": {"type": "string"}, "if": {}}, "required": ["if"]},
        {"allOf": [{"$ref": "#/$defs/a"}], "description": "d", "$defs": {"a": {"type": "null"}}},
        {"enum": ["aa"], "minLength": 1},
        {"type": "array", "uniqueItems": False},
        nested(63),
        True,
    ],
)
def test_schemas_that_can_be_kept_to(schema):
    assert json.loads(StructuredOutputsParams(json=schema).json) == schema


@pytest.mark.parametrize("options", [{"ignore_eos": True}, {"min_tokens": 1}])
def test_the_grammar_alone_says_where_the_end_may_be(options):
    with pytest.raises(ValueError, match="its default with structured_outputs"):
        SamplingParams(structured_outputs=WORD, **options)


def test_params_survive_the_wire():
    params = SamplingParams(structured_outputs=StructuredOutputsParams(choice=["a", "b"]))
    sent = msgspec.msgpack.encode(params)
    assert msgspec.msgpack.decode(sent, type=SamplingParams) == params
