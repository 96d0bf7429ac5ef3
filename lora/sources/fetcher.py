"""Fetches adapters in threads of its own, so that one that is slow or failing delays nobody.

Knows which sources there are and what is done about their failures; requests, pages and images are
the business of whoever calls it.
"""

from __future__ import annotations

import itertools
import logging
import random
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path

from loraplex.lora.sources.disk_cache import DiskCache, Lease
from loraplex.lora.sources.download import download_files
from loraplex.lora.sources.hub import HubSource
from loraplex.lora.sources.listing import (
    PICKLED_FILE,
    Identity,
    Listing,
    Patience,
    Source,
    SourceFile,
    SourceUnavailable,
    choose_files,
)
from loraplex.lora.sources.local import LocalSource
from loraplex.lora.sources.reference import AdapterReference, SourceName
from loraplex.lora.sources.s3 import S3Source
from loraplex.lora.sources.settings import SourceSettings
from loraplex.lora.spec import AdapterChanged, AdapterError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FetchedAdapter:
    """An adapter's files on this machine, which stay until this is closed (or collected)."""

    reference: AdapterReference
    directory: Path
    identity: Identity = field(repr=False)
    num_bytes: int
    lease: Lease | None = field(repr=False)
    """None: the files are where the user has them."""
    token: str | None = field(repr=False)
    """What they were read with, of the request's own."""
    was_downloaded: bool = False
    """Whether they were not here before."""

    @property
    def version(self) -> str:
        """The commit, the hash of the ETags, or the fingerprint of the files."""
        return self.identity[-1]

    @property
    def key(self) -> bytes:
        """Where the files come from and their version: the same key, the same weights."""
        return blake2b("\0".join(self.identity).encode(), digest_size=16).digest()

    @property
    def holds_files(self) -> bool:
        """Whether the cache keeps the files for this: not once it is closed."""
        return self.lease is not None and self.lease.lock.is_open

    def share(self) -> FetchedAdapter:
        """The same files, to be closed on their own. Raises AdapterError."""
        try:
            return replace(self, lease=self.lease.share() if self.lease else None)
        except OSError as error:  # A lease is an open file, of which a process has only so many.
            raise AdapterError(
                f"adapter {str(self.reference)!r} cannot be opened: {error.strerror}", 503
            ) from None

    def close(self) -> None:
        if self.lease is not None:
            self.lease.close()

    def __enter__(self) -> FetchedAdapter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_Key = tuple[AdapterReference, str | None, Identity | None]


@dataclass(eq=False)
class _Fetch:
    """One that is under way, and who waits for it."""

    key: _Key
    waiters: list[Future[FetchedAdapter]] = field(default_factory=list)


class AdapterFetcher:
    """Turns references into directories. Thread-safe.

    A reference is fetched once however many ask with the same token; one whose files are there
    already still asks its source for the version, and whether this token may read it.
    """

    def __init__(self, settings: SourceSettings, cache_directory: Path) -> None:
        """cache_directory: where downloads are kept."""
        self._settings = settings
        self._cache = DiskCache(cache_directory, settings.adapter_cache_bytes)
        self._sources: dict[SourceName, Source] = {
            "hub": HubSource(
                settings.adapter_hub_endpoint, settings.effective_hub_token(), self._cache.recall
            ),
            "file": LocalSource(settings.adapter_roots or ()),
            "s3": S3Source(
                settings.adapter_s3_endpoint_url,
                settings.adapter_s3_roots or (),
                settings.adapter_stall_seconds,
                settings.adapter_fetch_threads,
            ),
        }
        # Threads apart, so that a source that hangs does not use up those of the others.
        self._threads = {
            name: ThreadPoolExecutor(settings.adapter_fetch_threads, f"adapter-{name}")
            for name in self._sources
        }
        self._lock = threading.Lock()
        self._fetches: dict[_Key, _Fetch] = {}
        self._failures: OrderedDict[_Key, tuple[float, AdapterError]] = OrderedDict()
        self._counts: Counter[str] = Counter()
        self._is_closing = threading.Event()

    def fetch(
        self,
        reference: AdapterReference,
        token: str | None = None,
        refresh: bool = False,
        identity: Identity | None = None,
    ) -> Future[FetchedAdapter]:
        """Begin to bring an adapter here; AdapterError, in the future, if that can't be.

        Every call asks the source which version is current, except while such a question is under
        way already, or has just failed; refresh asks even then. token: the request's own, for the
        hub. identity: the version that was had before, which alone will do; where it is in the
        cache, nobody is asked. Each result is to be closed when its files have been read.
        """
        future: Future[FetchedAdapter] = Future()
        key = reference, token if reference.source == "hub" else None, identity
        with self._lock:
            self._forget_old_failures()
            error = self._failures.get(key, (0.0, None))[1]
            if self._is_closing.is_set():
                future.set_exception(AdapterError("the engine is shutting down", status=503))
            elif error is not None and not refresh:
                future.set_exception(type(error)(str(error), error.status))
            else:
                fetch = self._fetches.get(key)
                if fetch is None or refresh:
                    fetch = self._fetches[key] = _Fetch(key)
                    self._threads[reference.source].submit(self._run, fetch)
                fetch.waiters.append(future)
        return future

    def delete(self, fetched: FetchedAdapter) -> None:
        """Remove the files of a version from the cache, unless somebody reads them; what was not
        downloaded stays."""
        self._threads[fetched.reference.source].submit(self._cache.remove, fetched.identity)

    def stats(self) -> dict[str, int]:
        """Counts so far."""
        names = ("fetches", "failures", "retries", "cache_hits", "downloads", "downloaded_bytes")
        with self._lock:
            counts = {name: self._counts[name] for name in names}
            counts["fetching"] = len(self._fetches)
        return counts

    def num_bytes_on_disk(self) -> int:
        """Of what was downloaded, for which the cache's directory is read."""
        return self._cache.num_bytes()

    def close(self) -> None:
        """End all fetches, those under way with an error, and wait for their threads."""
        with self._lock:
            self._is_closing.set()
        for threads in self._threads.values():
            threads.shutdown()

    # -- in the threads --------------------------------------------------------------------

    def _run(self, fetch: _Fetch) -> None:
        outcome: FetchedAdapter | AdapterError
        reference = fetch.key[0]
        try:
            outcome = self._fetch(*fetch.key)
        except AdapterError as error:
            outcome = type(error)(f"adapter {str(reference)!r}: {error}", error.status)
        except Exception as error:
            logger.exception("fetching adapter %s failed", reference)
            outcome = AdapterError(
                f"adapter {str(reference)!r} could not be fetched: {type(error).__name__}", 500
            )
        self._end(fetch, outcome)
        for future in fetch.waiters:
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(_share(outcome))
            except AdapterError as error:
                future.set_exception(error)
        if isinstance(outcome, FetchedAdapter):
            outcome.close()

    def _end(self, fetch: _Fetch, outcome: FetchedAdapter | AdapterError) -> None:
        """From here on the next one who asks begins anew, or is told of the failure."""
        with self._lock:
            self._counts["fetches"] += 1
            self._counts["failures"] += isinstance(outcome, AdapterError)
            if self._fetches.get(fetch.key) is not fetch:
                return  # A refresh has overtaken it, and knows better.
            del self._fetches[fetch.key]
            self._failures.pop(fetch.key, None)
            if isinstance(outcome, AdapterError):
                retry_at = time.monotonic() + self._settings.adapter_retry_seconds
                self._failures[fetch.key] = retry_at, outcome

    def _fetch(
        self, reference: AdapterReference, token: str | None, identity: Identity | None
    ) -> FetchedAdapter:
        """Attempt it until it is done, or hopeless."""
        settings = self._settings
        deadline = time.monotonic() + settings.adapter_fetch_seconds
        patience = Patience(deadline, settings.adapter_stall_seconds, self._is_closing.is_set)
        num_attempts, delay = 1, settings.adapter_backoff_seconds
        while True:
            try:
                return self._attempt(reference, token, identity, patience)
            except SourceUnavailable as error:
                patience.check_open()
                is_last = num_attempts >= settings.adapter_fetch_attempts
                wait = delay * random.uniform(0.5, 1.5)
                if is_last or time.monotonic() + wait > deadline:
                    raise AdapterError(f"{error} ({num_attempts} attempts)", error.status) from None
                logger.info("adapter %s: %s; next attempt in %.1f s", reference, error, wait)
            self._is_closing.wait(wait)
            num_attempts, delay = num_attempts + 1, 2 * delay
            self._count("retries", 1)

    def _attempt(
        self,
        reference: AdapterReference,
        token: str | None,
        identity: Identity | None,
        patience: Patience,
    ) -> FetchedAdapter:
        wanted = reference
        if identity is not None:
            lease = self._cache.lease(identity)
            if lease is not None:
                return FetchedAdapter(
                    reference, lease.directory, identity, lease.num_bytes, lease, token
                )
            if reference.source == "hub":
                wanted = replace(reference, revision=identity[-1])
        listing = self._sources[reference.source].find(wanted, token, patience)
        if identity not in (None, listing.identity):
            raise AdapterChanged("its files have changed since it was asked for")
        was_downloaded = False
        if listing.files is None:
            lease = self._cache.lease(listing.identity)
            if lease is None:
                raise AdapterError("its cached copy has just been removed", status=404)
        else:
            files = choose_files(listing.files, self._settings.allow_pickled_adapters)
            is_pickled = any(file.name == PICKLED_FILE for file in files)
            if listing.directory is not None and not is_pickled:
                num_bytes = sum(file.num_bytes for file in files)
                return FetchedAdapter(
                    reference, listing.directory, listing.identity, num_bytes, None, token
                )
            lease, was_downloaded = self._lease(listing, files, patience)
            if listing.alias is not None:
                self._cache.remember(listing.alias, listing.identity)
        return FetchedAdapter(
            reference,
            lease.directory,
            listing.identity,
            lease.num_bytes,
            lease,
            token,
            was_downloaded,
        )

    def _lease(
        self, listing: Listing, files: Sequence[SourceFile], patience: Patience
    ) -> tuple[Lease, bool]:
        """The files from the cache; first into it, if need be, which the second value says."""
        num_bytes, limit = sum(file.num_bytes for file in files), self._settings.max_adapter_bytes
        if num_bytes > limit:
            raise AdapterError(
                f"its files have {num_bytes} bytes, which is not allowed: this server downloads at "
                f"most {limit} (max_adapter_bytes)"
            )
        lease = self._cache.lease(listing.identity)
        if lease is not None:
            self._count("cache_hits", 1)
            return lease, False
        num_written = itertools.count()

        def write(directory: Path) -> None:
            on_bytes = partial(self._count, "downloaded_bytes")
            download_files(listing, files, directory, patience, on_bytes)
            self._count("downloads", 1)
            next(num_written)

        lease = self._cache.fill(listing.identity, num_bytes, write, patience.next_timeout)
        return lease, next(num_written) > 0

    def _count(self, name: str, number: int) -> None:
        with self._lock:
            self._counts[name] += number

    # -- with the lock held ----------------------------------------------------------------

    def _forget_old_failures(self) -> None:
        now = time.monotonic()
        while self._failures:
            key, (retry_at, _) = next(iter(self._failures.items()))
            if retry_at > now:
                return
            del self._failures[key]


def _share(outcome: FetchedAdapter | AdapterError) -> FetchedAdapter:
    """The same adapter, to be closed on its own. Raises the same error, for one waiter alone."""
    if isinstance(outcome, AdapterError):
        raise type(outcome)(str(outcome), outcome.status)
    return outcome.share()
