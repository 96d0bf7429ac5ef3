"""What can go wrong with an adapter at its source, on this machine's disk, and while it is read.

All is real but for two things: the full disk is an error of `fsync`, and the adapter that is
deleted while it is loaded is deleted by a wrapper of the loader.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from loraplex.benchmarks.fake_hub import FakeHub
from loraplex.benchmarks.faulty_server import FaultyServer
from loraplex.engine.lora_request import LoRARequest

ALWAYS = 1 << 30


@dataclass
class Stores:
    """Where adapters come from."""

    hub: FakeHub
    hub_server: FaultyServer
    s3: FaultyServer
    directory: Path
    """Of local adapters."""
    files: dict[str, bytes]
    """Of an adapter that is as it should be."""


Fault = Callable[[Stores], AbstractContextManager[LoRARequest]]
"""Makes requests like the one that it gives fail, while it is open."""


@contextmanager
def cut_in_its_repository(stores: Stores) -> Iterator[LoRARequest]:
    weights = stores.files["adapter_model.safetensors"]
    cut = {"adapter_model.safetensors": weights[: len(weights) // 2]}
    repo = stores.hub.add("bench/cut", stores.files | cut)
    yield LoRARequest("cut", "hub:bench/cut")
    repo.commit(stores.files)


@contextmanager
def damaged_on_its_way(stores: Stores) -> Iterator[LoRARequest]:
    stores.hub.add("bench/damaged", stores.files)
    stores.hub_server.add_fault(
        "/cdn/bench/damaged/", replace=lambda body: body[:-1] + b"\0", times=ALWAYS
    )
    yield LoRARequest("damaged", "hub:bench/damaged")
    stores.hub_server.clear_faults()


@contextmanager
def full_disk(stores: Stores) -> Iterator[LoRARequest]:
    stores.hub.add("bench/full", stores.files)
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with mock.patch.object(os, "fsync", side_effect=error):
        yield LoRARequest("full", "hub:bench/full")


@contextmanager
def hub_is_down(stores: Stores) -> Iterator[LoRARequest]:
    stores.hub.add("bench/down", stores.files)
    stores.hub_server.add_fault("/", status=503, times=ALWAYS)
    yield LoRARequest("down", "hub:bench/down")
    stores.hub_server.clear_faults()


@contextmanager
def hub_sends_nothing(stores: Stores) -> Iterator[LoRARequest]:
    stores.hub.add("bench/silent", stores.files)
    stores.hub_server.add_fault("/cdn/bench/silent/", hold_at=0, times=ALWAYS)
    yield LoRARequest("silent", "hub:bench/silent")
    stores.hub_server.clear_faults()


@contextmanager
def s3_sends_nothing(stores: Stores) -> Iterator[LoRARequest]:
    stores.s3.add_fault("silent/adapter_model", hold_at=0, times=ALWAYS)
    yield LoRARequest("silent", "s3://adapters/silent")
    stores.s3.clear_faults()


@contextmanager
def deleted_while_it_is_loaded(stores: Stores) -> Iterator[LoRARequest]:
    from loraplex.lora import host_store

    path, load = stores.directory / "doomed", host_store.load_adapter
    write_files(path, stores.files)

    def delete_and_load(recipe: Any, *arguments: Any) -> Any:
        if str(path) in recipe:
            shutil.rmtree(path, ignore_errors=True)
        return load(recipe, *arguments)

    with mock.patch.object(host_store, "load_adapter", delete_and_load):
        yield LoRARequest("doomed", str(path))
    write_files(path, stores.files)


FAULTS: dict[str, Fault] = {
    "cut in its repository": cut_in_its_repository,
    "damaged on its way": damaged_on_its_way,
    "full disk": full_disk,
    "hub answers 503": hub_is_down,
    "hub sends nothing": hub_sends_nothing,
    "S3 sends nothing": s3_sends_nothing,
    "deleted while it is loaded": deleted_while_it_is_loaded,
}


def write_files(directory: Path, files: dict[str, bytes]) -> None:
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
