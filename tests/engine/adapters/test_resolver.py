"""Adapters that are fetched, refused, changed and unloaded while a core runs on a fake device."""

from __future__ import annotations

import dataclasses

import pytest
from fake_device import expected_tokens, fake_core, run_to_end, tokens_of
from versioned_adapters import PATH, finish, request_of, tokens_of_version

from loraplex.engine import core as core_module
from loraplex.engine.adapters import resolver
from loraplex.engine.adapters.resolver import AdapterResolver
from loraplex.engine.errors import RequestError
from loraplex.engine.messages import EngineOutput, FinishReason, Service
from loraplex.lora.spec import AdapterError


class Clock:
    """Stands still until a test moves it."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """That of the resolvers of cores that are made in this test."""
    clock = Clock()

    def make(*args, **options) -> AdapterResolver:
        return AdapterResolver(*args, clock=clock, **options)

    monkeypatch.setattr(core_module, "AdapterResolver", make)
    return clock


def test_requests_wait_for_a_fetch_while_others_run():
    core = fake_core(num_pages=50)
    store = core._device.adapter_store
    store.holds_fetches = True
    for i in range(500):
        core.add_request(request_of(f"r{i}"))
    core.add_request(request_of("base", adapter=None))
    finished = []
    while "base" not in finished:
        finished += [output.request_id for output in core.step() if output.finish_reason]
        core.check_integrity()
    assert finished == ["base"]
    stats = core.stats()
    assert (stats["num_fetching"], stats["num_waiting"], len(store.fetches)) == (500, 500, 1)
    outputs = run_to_end(core)
    assert all(tokens_of(outputs[f"r{i}"]) == expected_tokens(request_of("r")) for i in range(500))
    assert len(store.files) == core.stats()["adapter_loads"] == 1


def test_a_failed_fetch_fails_its_requests_and_is_asked_again():
    core = fake_core(num_pages=50)
    store = core._device.adapter_store
    store.holds_fetches = True
    core.add_request(request_of("bad1"))
    core.add_request(request_of("bad2"))
    core.step()
    store.finish_fetches(AdapterError("the hub is down", status=502))
    core.add_request(request_of("good", adapter="b"))
    outputs = run_to_end(core)
    for request_id in ("bad1", "bad2"):
        (output,) = outputs[request_id]
        assert (output.error, output.error_status) == ("the hub is down", 502)
    assert outputs["good"][-1].finish_reason == FinishReason.LENGTH
    assert tokens_of(finish(core, request_of("again"))) == expected_tokens(request_of("again"))


def test_a_bad_reference_is_refused_at_once():
    core = fake_core(num_pages=50)
    request = request_of("r")
    request.lora_request = dataclasses.replace(request.lora_request, lora_path="!")
    with pytest.raises(RequestError, match="lora_path='!' is not allowed"):
        core.add_request(request)
    core.check_integrity()


def test_a_request_may_end_while_its_adapter_is_fetched():
    core = fake_core(num_pages=50, max_queue_seconds=1e-9)
    store = core._device.adapter_store
    store.holds_fetches = True
    core.add_request(request_of("late"))
    patient = request_of("aborted")
    patient.service = Service(max_queue_seconds=1000)
    core.add_request(patient)
    (output,) = core.step()
    assert (output.request_id, output.error_status) == ("late", 503)
    core.abort_requests(["aborted"])
    (output,) = core.step()
    assert output.finish_reason == FinishReason.ABORT
    core.check_integrity()
    run_to_end(core)
    store.finish_fetches()
    core.step()
    core.check_integrity()
    assert all(files.is_closed for files in store.files)


def test_requests_beyond_the_limit_are_refused_though_their_adapters_are_not_known():
    core = fake_core(num_pages=50, max_num_waiting=2)
    core._device.adapter_store.holds_fetches = True
    for i in range(4):
        core.add_request(request_of(f"r{i}", adapter=f"a{i}"))
    with pytest.raises(RequestError, match="max_num_waiting is 2") as caught:
        core.add_request(request_of("r4"))
    assert caught.value.status == 429
    core.check_integrity()
    outputs = run_to_end(core)
    assert sorted(outputs) == ["r0", "r1", "r2", "r3"]


def test_tokens_are_asked_for_apart_and_again_when_their_time_is_over(clock: Clock):
    core = fake_core(num_pages=50, adapter_authorization_seconds=60.0)
    store = core._device.adapter_store
    asked = []
    fetch = store.fetch

    def note(lora_request, refresh=False):
        asked.append(lora_request.token)
        return fetch(lora_request, refresh)

    store.fetch = note
    for i, token in enumerate(["x", None, "y", "x", None]):
        finish(core, request_of(f"r{i}", token=token))
    assert asked == ["x", None, "y"]
    assert core.stats()["adapter_loads"] == 1, "it is one adapter, whoever asks"
    clock.now += 61
    store.holds_fetches = True
    core.add_request(request_of("later", token="x"))
    core.step()
    store.finish_fetches(AdapterError("not for you", status=403))
    outputs = run_to_end(core)
    assert outputs["later"][-1].error == "not for you", "though it is in the pool"
    store.holds_fetches = False
    finish(core, request_of("everybody"))
    assert asked == ["x", None, "y", "x"]


def test_an_adapter_that_can_not_be_served_is_asked_for_again():
    core = fake_core(num_pages=50)
    store = core._device.adapter_store
    request = request_of("r")
    request.lora_request = dataclasses.replace(request.lora_request, lora_path="fail=2")
    for _ in range(2):
        assert "can't be served" in finish(core, request)[-1].error
    assert len(store.files) == 2
    assert not core._adapters._adapters


def test_a_version_that_is_gone_is_replaced_for_those_that_wait():
    """Local files may be changed at any time: what was not read yet can't be had any more."""
    core = fake_core(num_pages=50)
    store = core._device.adapter_store
    first = request_of("first")
    core.add_request(first)
    core.step()
    store.change(PATH)
    outputs = run_to_end(core)
    assert tokens_of(outputs["first"]) == tokens_of_version(first, 1)
    again = request_of("again")
    outputs = finish(core, again)
    assert tokens_of(outputs) == tokens_of_version(again, 1)
    assert outputs[0].num_cached_tokens == 8
    assert [a.version for a in core._adapters] == [f"{PATH}@1".encode()]


def test_who_waits_for_a_version_that_is_gone_learns_that_there_is_no_next():
    core = fake_core(num_pages=50)
    store = core._device.adapter_store
    core.add_request(request_of("r"))
    core.step()
    store.change(PATH)

    def refuse(lora_request, refresh=False):
        raise AdapterError("unplugged", status=404)

    store.fetch = refuse
    outputs = run_to_end(core)["r"]
    assert (outputs[-1].error, outputs[-1].error_status) == ("unplugged", 404)
    core.check_integrity()


def test_answers_are_bounded_and_pins_outlast_them(monkeypatch):
    monkeypatch.setattr(resolver, "MAX_NUM_ANSWERS", 3)
    core = fake_core(num_pages=50)
    operation = core.preload_adapter(request_of("r").lora_request, pin=True)
    run_to_end(core)
    operation.result(0)
    for name in "bcde":
        finish(core, request_of("r", adapter=name))
        core.check_integrity()
    assert sorted(a["lora_name"] for a in core.adapters()) == ["a", "d", "e"]
    assert core.stats()["pages_adapter_idle"] == 4


def test_a_new_version_takes_over_and_the_old_one_leaves_nothing(clock: Clock):
    core = fake_core(num_pages=50, adapter_authorization_seconds=60.0)
    store = core._device.adapter_store
    old = request_of("old", token="x", max_tokens=30)
    core.add_request(old)
    outputs: list[EngineOutput] = []
    while len(tokens_of(outputs)) < 5:
        outputs += core.step()
        store.finish_copies()
    store.change(PATH)
    clock.now += 61
    new = request_of("new", token="x")
    core.add_request(new)
    rest = run_to_end(core)
    assert tokens_of(outputs + rest["old"]) == tokens_of_version(old, 0)
    assert tokens_of(rest["new"]) == tokens_of_version(new, 1)
    assert rest["new"][0].num_cached_tokens == 0, "versions share no KV"
    assert store.images == {f"{PATH}@1".encode()}
    stats = core.stats()
    assert (stats["pages_adapter_idle"], stats["pages_kv_cached"]) == (2, 3)
