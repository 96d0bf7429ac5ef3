"""What sampling parameters may be, and how mistakes are named."""

from __future__ import annotations

import dataclasses

import pytest

from loraplex.engine.sampling_params import MAX_LOGPROBS, SamplingParams


def test_defaults_change_nothing():
    params = SamplingParams()
    assert not params.is_greedy
    assert not params.has_penalties
    assert (params.n, params.top_k, params.top_p, params.min_p) == (1, 0, 1.0, 0.0)
    assert (params.stop, params.stop_token_ids, params.logit_bias) == ((), (), {})
    assert params.max_tokens == 16


@pytest.mark.parametrize(
    ("given", "field", "kept"),
    [
        ({"stop": "x"}, "stop", ("x",)),
        ({"stop": ["x", "yz"]}, "stop", ("x", "yz")),
        ({"stop": None}, "stop", ()),
        ({"stop": []}, "stop", ()),
        ({"stop_token_ids": [3, 4]}, "stop_token_ids", (3, 4)),
        ({"stop_token_ids": None}, "stop_token_ids", ()),
        ({"allowed_token_ids": [4, 3, 4]}, "allowed_token_ids", (4, 3)),
        ({"bad_words": ["x", "y z"]}, "bad_words", ("x", "y z")),
        ({"bad_words": None}, "bad_words", ()),
        ({"logit_bias": {"50": 1, 7: -2.5}}, "logit_bias", {50: 1.0, 7: -2.5}),
        ({"logit_bias": None}, "logit_bias", {}),
        ({"top_k": -1}, "top_k", -1),
        ({"seed": 2**64 - 1}, "seed", 2**64 - 1),
        ({"seed": -(2**63)}, "seed", -(2**63)),
        ({"max_tokens": None, "min_tokens": 10**6}, "max_tokens", None),
        ({"logprobs": MAX_LOGPROBS}, "logprobs", MAX_LOGPROBS),
    ],
)
def test_forms(given, field, kept):
    assert getattr(SamplingParams(**given), field) == kept


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0), ("n", 129), ("n", 1.0), ("n", True), ("n", None),
        ("temperature", -0.1), ("temperature", 101), ("temperature", "1"),
        ("temperature", float("nan")), ("temperature", True),
        ("top_k", -2), ("top_k", 1.5), ("top_k", 2**31), ("max_tokens", 2**31),
        ("min_tokens", 2**31),
        ("top_p", 0), ("top_p", 1.01), ("top_p", float("inf")),
        ("min_p", -0.1), ("min_p", 1.1),
        ("repetition_penalty", 0), ("repetition_penalty", 101),
        ("presence_penalty", 2.1), ("frequency_penalty", -2.1),
        ("ignore_eos", 1), ("detokenize", None), ("skip_special_tokens", "no"),
        ("include_stop_str_in_output", 1),
        ("seed", 2**64), ("seed", -(2**63) - 1), ("seed", 1.0),
        ("stop", [""]), ("stop", ""), ("stop", [3]), ("stop", 3),
        ("stop_token_ids", [-1]), ("stop_token_ids", [1.5]), ("stop_token_ids", "x"),
        ("allowed_token_ids", []), ("allowed_token_ids", [-1]), ("allowed_token_ids", ["1"]),
        ("bad_words", [""]), ("bad_words", [3]), ("bad_words", ["x" * 257]),
        ("bad_words", ["x"] * 1025),
        ("min_tokens", -1), ("min_tokens", 17),
        ("max_tokens", 0), ("max_tokens", 1.5),
        ("logprobs", -1), ("logprobs", MAX_LOGPROBS + 1), ("prompt_logprobs", 1.5),
        ("logit_bias", [3]), ("logit_bias", {"a": 1}), ("logit_bias", {1: None}),
        ("logit_bias", {1: 101}), ("logit_bias", {-1: 1}), ("logit_bias", {1: float("nan")}),
    ],
)  # fmt: skip
def test_what_is_not_allowed_is_named(field, value):
    with pytest.raises(ValueError, match=rf"^{field}.* is not allowed: it must be "):
        SamplingParams(**{field: value})


@pytest.mark.parametrize("field", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_penalties(field):
    assert SamplingParams(**{field: 0.5}).has_penalties


def test_no_temperature_is_greedy():
    assert SamplingParams(temperature=0).is_greedy
    assert not SamplingParams(temperature=0.01).is_greedy


def test_parameters_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().temperature = 2.0
