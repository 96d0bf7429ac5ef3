"""Adapters between their sources and the pool: fetched, read into host memory, copied to pages."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Any, cast

import torch

from loraplex.engine.adapters.store import Identity
from loraplex.engine.lora_request import LoRARequest
from loraplex.lora.host_store import AdapterFiles, HostAdapterStore
from loraplex.lora.recipe import Merge, MergeRecipe, Recipe
from loraplex.lora.sources.fetcher import AdapterFetcher, FetchedAdapter
from loraplex.lora.sources.reference import parse_adapter_reference
from loraplex.lora.spec import AdapterError, AdapterTraits


@dataclass(frozen=True)
class FetchedParts:
    """The files of an adapter, or of those that are merged to it."""

    parts: tuple[FetchedAdapter, ...]
    merge: Merge | None

    @property
    def key(self) -> bytes:
        """The adapter's version: of its files, and of what is made of them."""
        if self.merge is None:
            return self.parts[0].key
        keys = b"".join(part.key for part in self.parts)
        return blake2b(keys + repr(self.merge).encode(), digest_size=16).digest()

    @property
    def num_downloads(self) -> int:
        return sum(part.was_downloaded for part in self.parts)

    @property
    def recipe(self) -> Recipe:
        paths = tuple(str(part.directory) for part in self.parts)
        return paths[0] if self.merge is None else MergeRecipe(paths, self.merge)

    def close(self) -> None:
        for part in self.parts:
            part.close()


class PooledAdapters:
    """The fetcher, the host store, and the pool's memory that it copies to.

    See loraplex.engine.adapters.manager.AdapterStore.
    """

    def __init__(
        self, fetcher: AdapterFetcher, store: HostAdapterStore, memory: torch.Tensor
    ) -> None:
        """The fetcher and the store are closed with this."""
        self._fetcher = fetcher
        self._store = store
        self._memory = memory

    def identify(self, lora_request: LoRARequest) -> Identity:
        references = []
        for part in lora_request.parts:
            reference = parse_adapter_reference(part.lora_path)
            token = part.token if reference.source == "hub" else None
            references.append((str(reference), token and _digest(token)))
        return Identity(tuple(references), lora_request.merge)

    def fetch(self, lora_request: LoRARequest, refresh: bool = False) -> Future[FetchedParts]:
        fetches = [
            self._fetcher.fetch(parse_adapter_reference(part.lora_path), part.token, refresh)
            for part in lora_request.parts
        ]
        return _gather(fetches, lora_request.merge)

    def num_pages(self, files: FetchedParts) -> int | None:
        try:
            image = self._store.get(files.key, partial(self._open, files))
        finally:
            # A read that has begun has them open on its own, and a later one opens them again.
            files.close()
        return None if image is None else image.num_pages

    def _open(self, files: FetchedParts) -> Future[AdapterFiles]:
        """The same files, to be closed on their own; fetched again where they may have gone."""
        opened = []
        for part in files.parts:
            if part.holds_files:
                opened.append(_shared(part))
            else:
                again = self._fetcher.fetch(part.reference, part.token, identity=part.identity)
                opened.append(again)
        return cast("Future[AdapterFiles]", _gather(opened, files.merge))

    def locate(self, files: FetchedParts) -> Future[str]:
        located: Future[str] = Future()

        def note(opened: Future[AdapterFiles]) -> None:
            error = opened.exception()
            if error is not None:
                located.set_exception(error)
                return
            with closing(cast("FetchedParts", opened.result())) as again:
                located.set_result(str(again.parts[0].directory))

        self._open(files).add_done_callback(note)
        return located

    def traits(self, version: bytes) -> AdapterTraits:
        return self._store.image(version).traits

    def copy_to_pages(
        self, version: bytes, pages: list[int], after_steps: bool, before_steps: bool
    ) -> Future[None]:
        return self._store.copy_to_pages(version, self._memory, pages, after_steps, before_steps)

    def holds(self, version: bytes) -> bool:
        return self._store.holds(version)

    def read_interval(self, version: bytes) -> tuple[float, float]:
        return self._store.read_interval(version)

    def drop(self, version: bytes) -> None:
        self._store.drop(version)

    def pin(self, version: bytes) -> None:
        self._store.pin(version)

    def unpin(self, version: bytes) -> None:
        self._store.unpin(version)

    def stats(self) -> dict[str, Any]:
        host, fetched = self._store.stats(), self._fetcher.stats()
        return {
            "host_adapters": host["images"],
            "host_adapter_bytes": host["bytes"],
            "host_adapter_reads": host["loads"],
            "host_adapter_drops": host["drops"],
            "adapter_fetches": fetched["fetches"],
            "adapter_fetch_failures": fetched["failures"],
            "adapter_downloads": fetched["downloads"],
            "adapter_downloaded_bytes": fetched["downloaded_bytes"],
        }

    def delete(self, files: FetchedParts) -> None:
        for part in files.parts:
            self._fetcher.delete(part)

    def close(self) -> None:
        self._fetcher.close()
        self._store.close()


def _digest(token: str) -> str:
    """What stands for a token where it may be seen."""
    return blake2b(token.encode(errors="surrogatepass"), digest_size=16).hexdigest()


def _shared(part: FetchedAdapter) -> Future[FetchedAdapter]:
    shared: Future[FetchedAdapter] = Future()
    try:
        shared.set_result(part.share())
    except AdapterError as error:
        shared.set_exception(error)
    return shared


def _gather(fetches: Sequence[Future[FetchedAdapter]], merge: Merge | None) -> Future[FetchedParts]:
    """All of them; the first failure, if there is one, when all have ended."""
    gathered: Future[FetchedParts] = Future()
    num_left = itertools.count(len(fetches) - 1, -1)

    def note(_: Future[FetchedAdapter]) -> None:
        if next(num_left) > 0:
            return
        errors = [error for fetch in fetches if (error := fetch.exception()) is not None]
        parts = tuple(fetch.result() for fetch in fetches if fetch.exception() is None)
        if not errors:
            gathered.set_result(FetchedParts(parts, merge))
            return
        for part in parts:
            part.close()
        gathered.set_exception(errors[0])

    for fetch in fetches:
        fetch.add_done_callback(note)
    return gathered
