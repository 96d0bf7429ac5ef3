"""Adapters are preloaded, pinned, refreshed and unloaded while a core on a fake device serves."""

from __future__ import annotations

import random
from concurrent.futures import Future
from typing import Any

import pytest
from fake_device import expected_tokens, fake_core, make_request, run_to_end, tokens_of
from versioned_adapters import PATH, finish, request_of, tokens_of_version

from loraplex.engine.core import EngineCore
from loraplex.engine.errors import RequestError
from loraplex.engine.lora_request import LoRARequest
from loraplex.lora.spec import AdapterError

A = LoRARequest("a", PATH)


def do(core: EngineCore, operation: Future[dict[str, Any]]) -> dict[str, Any]:
    run_to_end(core)
    return operation.result(0)


def lora(name: str, num_pages: int = 2) -> LoRARequest:
    return LoRARequest(name, f"{name}:pages={num_pages}")


@pytest.mark.parametrize("num_awaited_pages", [0, 100])
def test_a_preloaded_adapter_needs_no_load(num_awaited_pages):
    core = fake_core(num_pages=50, num_awaited_pages=num_awaited_pages)
    state = do(core, core.preload_adapter(A))
    assert (state["num_pages"], state["pinned"], state["lora_name"]) == (2, None, "a")
    assert core.stats()["pages_adapter_idle"] == 2
    finish(core, request_of("r"))
    assert core.stats()["adapter_loads"] == 1
    do(core, core.preload_adapter(lora("b"), tier="host"))
    assert core.stats()["adapter_loads"] == 1
    assert core._device.adapter_store.images == {b"a:pages=2@0", b"b:pages=2@0"}
    with pytest.raises(RequestError, match="tier='disk' is not allowed"):
        core.preload_adapter(A, tier="disk")


@pytest.mark.parametrize("num_awaited_pages", [0, 100])
def test_who_wants_an_adapter_that_is_on_its_way_waits_for_the_same_copy(num_awaited_pages):
    core = fake_core(num_pages=50, num_awaited_pages=num_awaited_pages)
    operations = [core.preload_adapter(A, pin=pin) for pin in (False, True)]
    finish(core, request_of("r"))
    assert [operation.result(0)["tier"] for operation in operations] == ["pool", "pool"]
    assert core.stats()["adapter_loads"] == 1


def test_a_pinned_adapter_stays_whatever_else_is_wanted():
    core = fake_core(num_pages=30, max_model_len=16)
    assert do(core, core.preload_adapter(A, pin=True))["pinned"] == "pool"
    for i in range(20):
        request = make_request(f"r{i}", [i], 8, adapter=f"b{i}", num_adapter_pages=7)
        assert tokens_of(finish(core, request)) == expected_tokens(request)
        assert core.stats()["pages_adapter"] == 2
    assert core.stats()["adapter_evictions"] > 10
    finish(core, request_of("r"))
    assert core.stats()["adapter_loads"] == 21
    core.unpin_adapter(A)
    core.check_integrity()
    assert core.stats()["pages_adapter"] == 0
    with pytest.raises(RequestError, match="'a' is not pinned"):
        core.unpin_adapter(A)


def test_what_is_pinned_leaves_room_for_the_longest_request():
    core = fake_core(num_pages=21, max_model_len=16)
    do(core, core.preload_adapter(lora("a", 10), pin=True))
    with pytest.raises(RequestError, match="no room for adapter 'b': it takes 7 pages") as caught:
        do(core, core.preload_adapter(lora("b", 7), pin=True))
    assert caught.value.status == 409
    do(core, core.preload_adapter(lora("c", 6), pin=True))
    outputs = finish(core, make_request("r", [1], 15, adapter="a", num_adapter_pages=10))
    assert len(tokens_of(outputs)) == 15
    (output,) = finish(core, make_request("r", [1], 15, adapter="d", num_adapter_pages=2))
    assert "20, 16 of them for pinned adapters" in output.error


def test_a_pin_waits_for_running_requests_and_passes_the_waiting_ones():
    core = fake_core(num_pages=13, max_model_len=16, max_num_seqs=8)
    for i in range(30):
        core.add_request(make_request(f"r{i}", [i], 15))
    core.step()
    operation = core.preload_adapter(lora("a", 6), pin=True)
    num_finished = 0
    while not operation.done():
        num_finished += sum(output.finish_reason is not None for output in core.step())
        core._device.adapter_store.finish_copies()
        core.check_integrity()
    assert num_finished < 15
    assert core.stats()["pages_adapter"] == 6
    run_to_end(core)


def test_pins_in_host_memory_are_the_stores():
    core = fake_core(num_pages=50)
    store = core._device.adapter_store
    for name in "ab":
        assert do(core, core.preload_adapter(lora(name), tier="host", pin=True))["pinned"] == "host"
    with pytest.raises(AdapterError, match="no room to pin"):
        do(core, core.preload_adapter(lora("c"), tier="host", pin=True))
    do(core, core.preload_adapter(lora("a"), tier="pool", pin=True))
    assert store.pinned == {b"b:pages=2@0"}, "an adapter is pinned in one place"
    core.unload_adapter(lora("b"))
    core.unload_adapter(lora("a"))
    run_to_end(core)
    core.check_integrity()
    assert [a["lora_name"] for a in core.adapters()] == ["c"]


def test_operations_that_fail_leave_nothing():
    core = fake_core(num_pages=50)
    store = core._device.adapter_store
    with pytest.raises(ValueError, match="can't be served"):
        do(core, core.preload_adapter(LoRARequest("f", "fail=2")))
    with pytest.raises(ValueError, match="lora_path='!' is not allowed"):
        do(core, core.preload_adapter(LoRARequest("f", "!")))
    store.holds_fetches = True
    for start in (core.preload_adapter, core.refresh_adapter):
        operation = start(A)
        core.step()
        store.finish_fetches(AdapterError("the hub is down", status=502))
        with pytest.raises(AdapterError, match="the hub is down"):
            do(core, operation)
    assert core.adapters() == []
    assert all(files.is_closed for files in store.files)


def test_a_refresh_swaps_versions_under_running_requests():
    core = fake_core(num_pages=50)
    store = core._device.adapter_store
    do(core, core.preload_adapter(A, pin=True))
    old = request_of("old", max_tokens=30)
    core.add_request(old)
    outputs = core.step()
    assert do_meanwhile(core, core.refresh_adapter(A), outputs) == {"changed": False}
    store.change(PATH)
    outputs += core.step()
    assert do_meanwhile(core, core.refresh_adapter(A), outputs) == {"changed": True}
    assert store.images == {b"a:pages=2@0", b"a:pages=2@1"}
    new = request_of("new")
    core.add_request(new)
    rest = run_to_end(core)
    mine = [o for o in outputs if o.request_id == "old"] + rest["old"]
    assert tokens_of(mine) == tokens_of_version(old, 0)
    assert tokens_of(rest["new"]) == tokens_of_version(new, 1)
    assert store.images == {b"a:pages=2@1"}
    assert [a["pinned"] for a in core.adapters()] == ["pool"], "the pin is the name's"


def do_meanwhile(core, operation, outputs) -> dict[str, Any]:
    while not operation.done():
        outputs += core.step()
        core.check_integrity()
        core._device.adapter_store.finish_copies()
    return {"changed": operation.result()["changed"]}


def test_a_version_that_can_not_be_read_replaces_nothing():
    core = fake_core(num_pages=50)
    store = core._device.adapter_store
    finish(core, request_of("r"))
    store.change(PATH)
    store.broken.add(f"{PATH}@1".encode())
    with pytest.raises(AdapterError, match="broken"):
        do(core, core.refresh_adapter(A))
    again = request_of("again")
    assert tokens_of(finish(core, again)) == tokens_of_version(again, 0)
    core.check_integrity()


@pytest.mark.parametrize("abort", [False, True])
def test_unloading_drains_or_aborts_and_frees_every_tier(abort):
    core = fake_core(num_pages=50, max_num_seqs=1)
    store = core._device.adapter_store
    requests = [request_of(f"r{i}", max_tokens=20) for i in range(3)]
    for request in requests:
        core.add_request(request)
    outputs: list = []
    while not tokens_of(outputs):
        outputs += core.step()
        store.finish_copies()
    assert core.unload_adapter(A, abort, delete_files=True) == {"num_requests": 3}
    assert store.deleted == []
    rest = run_to_end(core)
    for request in requests:
        mine = [o for o in outputs if o.request_id == request.request_id]
        mine += rest[request.request_id]
        if abort:
            assert mine[-1].error == "the adapter 'a' was unloaded"
        else:
            assert tokens_of(mine) == expected_tokens(request)
    core.check_integrity()
    assert store.images == set()
    assert store.deleted == [b"a:pages=2@0"]
    stats = core.stats()
    assert stats["pages_free"] == stats["pages_total"], "of KV, too"
    assert tokens_of(finish(core, request_of("new"))) == expected_tokens(request_of("new"))


def test_what_is_unloaded_while_it_is_to_be_pinned_is_not_pinned():
    core = fake_core(num_pages=50)
    operation = core.preload_adapter(A, pin=True)
    while not core.adapters():
        core.step()
    core.unload_adapter(A)
    with pytest.raises(RequestError, match="was unloaded or replaced meanwhile"):
        do(core, operation)
    core.check_integrity()
    assert core.adapters() == []


def test_files_of_an_adapter_that_came_back_are_kept():
    core = fake_core(num_pages=50)
    core.add_request(request_of("old", max_tokens=20))
    core.step()
    core.unload_adapter(A, delete_files=True)
    core.add_request(request_of("new"))
    run_to_end(core)
    assert core._device.adapter_store.deleted == []
    assert [a["lora_name"] for a in core.adapters()] == ["a"]


def test_200_adapters_are_swapped_under_load():
    core = fake_core(num_pages=60, max_model_len=32, max_num_seqs=6)
    store = core._device.adapter_store
    rng = random.Random(0)
    version_at: dict[str, int] = {}
    requests, outputs, operations = {}, {}, []
    for i in range(400):
        name = f"a{rng.randrange(200)}"
        path = lora(name).lora_path
        request = make_request(f"r{i}", [i % 7] * 9, 5, adapter=name)
        core.add_request(request)
        requests[request.request_id] = request
        if rng.random() < 0.5:
            store.change(path)
            operations.append(core.refresh_adapter(lora(name)))
        if rng.random() < 0.1:
            core.unload_adapter(lora(f"a{rng.randrange(200)}"), delete_files=True)
        for output in core.step():
            outputs.setdefault(output.request_id, []).append(output)
        store.finish_copies()
        core.check_integrity()
    for request_id, more in run_to_end(core).items():
        outputs.setdefault(request_id, []).extend(more)
    for request_id, request in requests.items():
        tokens = tokens_of(outputs[request_id])
        path = request.lora_request.lora_path
        versions = range(store.versions[path] + 1)
        (version,) = (v for v in versions if tokens == tokens_of_version(request, v))
        assert version >= version_at.get(path, 0), "no request gets an older one than one before it"
        version_at[path] = version
    assert all(operation.done() for operation in operations)
    for adapter in list(core.adapters()):
        core.unload_adapter(lora(adapter["lora_name"]))
    core.check_integrity()
    stats = core.stats()
    assert stats["pages_free"] == stats["pages_total"]
    assert store.images == set()
