"""Who may call, and how much: API keys with limits of their own, from flags or a file.

Knows no HTTP but the statuses of refusals.
"""

from __future__ import annotations

import logging
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path
from typing import Annotated

import msgspec

from loraplex.entrypoints.http.errors import ApiError
from loraplex.entrypoints.http.server_config import ServerConfig

logger = logging.getLogger(__name__)

# How often, in seconds, a key file is looked at for changes.
RELOAD_INTERVAL = 1.0

Positive = Annotated[int, msgspec.Meta(ge=1)]


class ApiKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One key, as a key file has it."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=100)]
    """Whose it is: the tenant among whom service is shared, and the name in the log."""
    key: str | None = None
    key_sha256: str | None = None
    """The key's SHA-256 in hexadecimal: then the file holds no secret."""
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    """Tokens of prompts and outputs. A request may overdraw it; the next ones wait for it."""
    max_concurrent_requests: Positive | None = None
    adapters: list[str] | None = None
    """Patterns (with * and ?) of the adapters that may be used; none: all. The base model may."""
    admin: bool = False
    """Whether the routes that change or show the server's inside are open to it."""

    @property
    def digest(self) -> bytes:
        """Raises ValueError if the entry does not give exactly one key."""
        if self.key and self.key_sha256 is None and self.key.isascii():
            return sha256(self.key.encode()).digest()
        if self.key is None and self.key_sha256 is not None and len(self.key_sha256) == 64:
            return bytes.fromhex(self.key_sha256)
        raise ValueError(
            f"the key of {self.name!r} is not allowed: it must have either key, of ASCII "
            "characters, or key_sha256, of 64 hexadecimal digits"
        )

    def may_use(self, adapter: str) -> bool:
        return self.adapters is None or any(fnmatchcase(adapter, p) for p in self.adapters)


class KeyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    keys: list[ApiKey]


class Budget:
    """What may be spent in a minute; saved up for one minute at most."""

    def __init__(self, per_minute: int | None) -> None:
        self._rate = None if per_minute is None else per_minute / 60
        self._most = self._left = float(per_minute or 0)
        self._time = time.monotonic()

    def wait(self, amount: float) -> float:
        """Seconds until so much is there."""
        if self._rate is None:
            return 0.0
        now = time.monotonic()
        self._left = min(self._most, self._left + (now - self._time) * self._rate)
        self._time = now
        return max(0.0, (amount - self._left) / self._rate)

    def spend(self, amount: float) -> None:
        self._left -= amount


class Caller:
    """A key in use."""

    def __init__(self, key: ApiKey) -> None:
        self.key = key
        self._num_running = 0
        self._requests = Budget(key.requests_per_minute)
        self._tokens = Budget(key.tokens_per_minute)

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Counts a request while it runs. Raises ApiError 429 for one too many."""
        most = self.key.max_concurrent_requests
        if most is not None and self._num_running >= most:
            raise self._refusal(f"max_concurrent_requests={most}", 1.0)
        if wait := self._requests.wait(1):
            raise self._refusal(f"requests_per_minute={self.key.requests_per_minute}", wait)
        if wait := self._tokens.wait(1):
            raise self._refusal(f"tokens_per_minute={self.key.tokens_per_minute}", wait)
        self._requests.spend(1)
        self._num_running += 1
        try:
            yield
        finally:
            self._num_running -= 1

    def check_adapter(self, name: str) -> None:
        """Raises ApiError 403 for one that the key is not for."""
        if not self.key.may_use(name):
            raise ApiError(
                403, f"this API key is not for the adapter {name!r}", code="adapter_not_allowed"
            )

    def spend_tokens(self, num_tokens: int) -> None:
        self._tokens.spend(num_tokens)

    def _refusal(self, limit: str, wait: float) -> ApiError:
        return ApiError(
            429, f"{limit} of this API key is reached; try again later",
            code="key_limit", retry_after=wait,
        )  # fmt: skip


class KeyRing:
    """The keys of a server. A file is read again when it changes; one that is not in order is
    told in the log, and the keys before it stay. Raises ValueError."""

    def __init__(self, keys: Sequence[str], path: Path | None) -> None:
        """keys: without limits, and for everything."""
        self._given = [ApiKey(name=f"key-{i}", key=k, admin=True) for i, k in enumerate(keys, 1)]
        self._path = path
        self._callers: dict[bytes, Caller] = {}
        self._next_look = 0.0
        self._stamp: object = None
        self._load()

    def find(self, key: str) -> Caller | None:
        """Whose key this is; None if nobody's."""
        self._reload()
        # Looked up by its digest, of which nobody who tries keys can choose the bits: the time
        # that this takes tells nothing of the keys.
        return self._callers.get(sha256(key.encode()).digest())

    def _reload(self) -> None:
        now = time.monotonic()
        if self._path is None or now < self._next_look:
            return
        self._next_look = now + RELOAD_INTERVAL
        try:
            if self._read_stamp() != self._stamp:
                self._load()
                logger.info("Read %d API keys again from %s.", len(self._callers), self._path)
        except ValueError as error:
            logger.error("The API keys stay as they were: %s", error)

    def _load(self) -> None:
        entries = list(self._given)
        if self._path is not None:
            self._stamp = self._read_stamp()
            entries += read_key_file(self._path)
        callers = {}
        for entry in entries:
            if entry.digest in callers:
                raise ValueError(f"the key of {entry.name!r} is not allowed: it is there twice")
            old = self._callers.get(entry.digest)
            # What a key has used up stays used up.
            callers[entry.digest] = old if old and old.key == entry else Caller(entry)
        self._callers = callers

    def _read_stamp(self) -> object:
        assert self._path is not None
        try:
            status = self._path.stat()
        except OSError as error:
            raise ValueError(f"api_key_file={str(self._path)!r} can't be read: {error}") from error
        return status.st_mtime_ns, status.st_size, status.st_ino


def make_key_ring(config: ServerConfig) -> KeyRing | None:
    """The keys that clients may have; None lets everybody in. Raises ValueError."""
    keys = config.api_keys()
    if not keys and config.api_key_file is None:
        return None
    path = None if config.api_key_file is None else Path(config.api_key_file).expanduser()
    return KeyRing(keys, path)


def read_key_file(path: Path) -> list[ApiKey]:
    """The keys in a TOML file. Raises ValueError, which shows none of them."""
    try:
        data = tomllib.loads(path.read_text())
        entries = msgspec.convert(data, KeyFile).keys
        for entry in entries:
            _ = entry.digest
    except (OSError, ValueError) as error:
        raise ValueError(f"api_key_file={str(path)!r} is not allowed: {error}") from error
    return entries
