"""Adapters are preloaded, pinned, refreshed and unloaded while requests run. No torch.

What takes longer than a step is a generator, which goes on once a step until it is done: it yields
where it has to wait. Its result, or the ValueError that it raises, ends up in a future.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from loraplex.engine.adapters.manager import Adapter, AdapterManager, Residency
from loraplex.engine.adapters.resolver import AdapterResolver, Outcome
from loraplex.engine.adapters.store import AdapterFiles, AdapterStore, Tier
from loraplex.engine.errors import RequestError
from loraplex.engine.lora_request import LoRARequest
from loraplex.engine.request import Request
from loraplex.engine.scheduling.fitting import Fitting
from loraplex.lora.spec import AdapterChanged

Operation = Generator[None, None, dict[str, Any]]
TIERS = ("host", "pool")


class AdapterLifecycle:
    """Operations on adapters. One thread calls it."""

    def __init__(
        self,
        store: AdapterStore,
        adapters: AdapterManager,
        resolver: AdapterResolver,
        fitting: Fitting,
        on_fetched: Callable[[], None],
    ) -> None:
        """on_fetched is called, by any thread, when `advance` has something to go on with."""
        self._store = store
        self._adapters = adapters
        self._resolver = resolver
        self._fitting = fitting
        self._on_fetched = on_fetched
        self._operations: dict[Operation, Future[dict[str, Any]]] = {}
        self._to_delete: list[AdapterFiles] = []
        self._requests: Collection[Request] = ()
        self._lacks_memory = False

    def preload(
        self, lora_request: LoRARequest, tier: Tier = "pool", pin: bool = False
    ) -> Future[dict[str, Any]]:
        """Bring an adapter into host memory, or into the pool; pin: it never leaves from there."""
        if tier not in TIERS:
            raise RequestError(f"tier={tier!r} is not allowed: it must be one of {TIERS}")
        return self._start(self._preload(lora_request, tier, pin))

    def refresh(self, lora_request: LoRARequest) -> Future[dict[str, Any]]:
        """Ask an adapter's source for its current version, which new requests get when it has been
        read; if it can't be, they go on with the old one, as those that run do in any case."""
        return self._start(self._refresh(lora_request))

    def locate(self, lora_request: LoRARequest, known_version: str) -> Future[dict[str, Any]]:
        """Find the version of an adapter and, if it is not the known one, the directory of its
        files. The adapter is read into host memory meanwhile: who asks will want it."""
        return self._start(self._locate(lora_request, known_version))

    def unpin(self, lora_request: LoRARequest) -> dict[str, Any]:
        """The adapter may be evicted again."""
        adapter = self._resolver.current(self._store.identify(lora_request))
        if adapter is None or adapter.pinned_tier is None:
            raise RequestError(f"adapter {lora_request.lora_name!r} is not pinned", status=404)
        self._adapters.unpin(adapter)
        return self._describe(adapter)

    def unload(self, lora_request: LoRARequest, delete_files: bool = False) -> list[Adapter]:
        """Forget an adapter, whoever has read it with whatever token: what it takes is freed when
        the last request that has it ends. Gives those that some have.

        delete_files: also what was downloaded, when the last request has ended.
        """
        adapters = self._resolver.forget_all(self._store.identify(lora_request))
        for adapter in adapters:
            if delete_files:
                self._to_delete.append(adapter.files)
            self._adapters.unload_unused(adapter)
        self._delete_files()
        return [adapter for adapter in adapters if adapter.num_requests > 0]

    def describe_all(self) -> list[dict[str, Any]]:
        """The state of each adapter that is known."""
        return [self._describe(adapter) for adapter in self._adapters]

    @property
    def is_busy(self) -> bool:
        return bool(self._operations or self._to_delete)

    def advance(self, requests: Collection[Request]) -> bool:
        """Go on with all operations. Gives whether one of them waits for memory, so that nobody
        else should get any. requests: the unfinished ones."""
        self._delete_files()
        if not self._operations:
            return False
        self._lacks_memory = False
        self._requests = requests
        for operation, future in list(self._operations.items()):
            try:
                next(operation)
                continue
            except StopIteration as end:
                future.set_result(end.value)
            except ValueError as error:
                future.set_exception(error)
            del self._operations[operation]
        return self._lacks_memory

    def _describe(self, adapter: Adapter) -> dict[str, Any]:
        paths = {path for identity in adapter.identities for path in identity.paths}
        return {
            "lora_name": adapter.lora_request.lora_name,
            "references": sorted(paths),
            "version": adapter.version.hex(),
            "tier": self._adapters.tier(adapter),
            "num_pages": len(adapter.pages),
            "pinned": adapter.pinned_tier,
            "num_requests": adapter.num_requests,
            "num_running": adapter.num_users,
        }

    def _start(self, operation: Operation) -> Future[dict[str, Any]]:
        future: Future[dict[str, Any]] = Future()
        self._operations[operation] = future
        return future

    def _delete_files(self) -> None:
        """Of what was unloaded meanwhile; of what has come back, nothing."""
        waiting, self._to_delete = self._to_delete, []
        for files in waiting:
            adapter = self._adapters.find(files.key)
            if adapter is None:
                self._store.delete(files)
            elif not adapter.identities:
                self._to_delete.append(files)

    # -- what goes on over many steps ------------------------------------------------------

    def _preload(self, lora_request: LoRARequest, tier: Tier, pin: bool) -> Operation:
        adapter = yield from self._find(lora_request)
        with self._held(adapter):
            yield from self._bring(adapter, tier, pin)
            return self._describe(adapter)

    def _refresh(self, lora_request: LoRARequest) -> Operation:
        identity = self._store.identify(lora_request)
        old = self._resolver.current(identity)
        fetched = self._store.fetch(lora_request, refresh=True)
        fetched.add_done_callback(lambda _: self._on_fetched())
        while not fetched.done():
            yield
        adapter = self._adapters.adopt(lora_request, fetched.result())
        with self._held(adapter):
            if adapter is old:
                adapter.files.close()
                return self._describe(adapter) | {"changed": False}
            yield from self._read(adapter)
            pinned_tier = None if old is None else old.pinned_tier
            self._resolver.replace(identity, adapter)
            self._resolver.expire(identity)
            if pinned_tier is not None:
                yield from self._bring(adapter, pinned_tier, pin=True)
            return self._describe(adapter) | {"changed": True}

    def _locate(self, lora_request: LoRARequest, known_version: str) -> Operation:
        try:
            while True:
                adapter = yield from self._find(lora_request)
                version = adapter.version.hex()
                with self._held(adapter):
                    if version == known_version:
                        adapter.files.close()
                        return {"version": version, "directory": None}
                    located = self._store.locate(adapter.files)
                    located.add_done_callback(lambda _: self._on_fetched())
                    if adapter.residency is Residency.ABSENT:
                        self._read_now(adapter)
                    adapter.files.close()
                    while not located.done():
                        yield
                    if not isinstance(located.exception(), AdapterChanged):
                        return {"version": version, "directory": located.result()}
                    self._resolver.forget(adapter)
        except ValueError:
            self._adapters.tally[lora_request.lora_name].failures += 1
            raise

    def _find(self, lora_request: LoRARequest) -> Generator[None, None, Adapter]:
        told: list[Outcome] = []
        waiter = object()
        adapter = self._resolver.resolve(lora_request, waiter, told.append)
        while adapter is None and not told:
            yield
        outcome = adapter or told[0]
        if isinstance(outcome, ValueError):
            raise outcome
        return outcome

    def _bring(self, adapter: Adapter, tier: Tier, pin: bool) -> Generator[None, None, None]:
        if tier == "host":
            yield from self._read(adapter)
        while tier == "pool" and adapter.residency is not Residency.RESIDENT:
            # While this waits, others who want it may begin the copy, or evict it again.
            is_absent = adapter.residency is Residency.ABSENT
            num_pages = self._read_now(adapter) if is_absent else None
            if num_pages is not None:
                self._check_room(adapter, num_pages, pin)
                is_there = self._adapters.start_copy(adapter, num_pages)
                if is_there:
                    break
                self._lacks_memory |= is_there is False
            yield
        if pin and not adapter.identities:
            name = adapter.lora_request.lora_name
            raise RequestError(f"adapter {name!r} was unloaded or replaced meanwhile", status=409)
        if pin:
            if tier == "pool":
                self._check_room(adapter, len(adapter.pages), pin)
            self._adapters.pin(adapter, tier)

    def _read(self, adapter: Adapter) -> Generator[None, None, int]:
        """Wait until it is in host memory; its pages."""
        while (num_pages := self._read_now(adapter)) is None:
            yield
        return num_pages

    def _read_now(self, adapter: Adapter) -> int | None:
        try:
            return self._store.num_pages(adapter.files)
        except ValueError:
            self._resolver.forget(adapter)
            raise

    def _check_room(self, adapter: Adapter, num_pages: int, pin: bool) -> None:
        if adapter.pinned_tier != "pool":
            name = adapter.lora_request.lora_name
            self._fitting.check_adapter(name, num_pages, self._requests if pin else None)

    @contextmanager
    def _held(self, adapter: Adapter) -> Iterator[None]:
        """It is not unloaded meanwhile."""
        adapter.num_holds += 1
        try:
            yield
        finally:
            adapter.num_holds -= 1
            self._adapters.unload_unused(adapter)
