"""What keeps adapters outside of the pool, as the engine's host half sees it. No torch."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any, Literal, NamedTuple, Protocol

from loraplex.engine.lora_request import LoRARequest
from loraplex.lora.recipe import Merge
from loraplex.lora.spec import AdapterTraits

Tier = Literal["host", "pool"]


class Identity(NamedTuple):
    """What is asked for: equal ones get the same adapter."""

    references: tuple[tuple[str, str | None], ...]
    """Of each part, in its canonical form, and a digest of the token if one counts there."""
    merge: Merge | None

    @property
    def has_token(self) -> bool:
        return any(token is not None for _, token in self.references)

    @property
    def paths(self) -> set[str]:
        """The references without their tokens."""
        return {path for path, _ in self.references}


class AdapterFiles(Protocol):
    """An adapter's files on this machine, which stay there until this is closed."""

    @property
    def key(self) -> bytes:
        """The adapter's version: the same key, the same weights."""

    @property
    def num_downloads(self) -> int:
        """How many of its parts had to be downloaded."""

    def close(self) -> None: ...


class AdapterStore(Protocol):
    """Adapters outside the pool: at their sources, on disk, and as images in host memory.

    It gets back only files that it gave: AdapterFiles with more to them, which is its own business.
    """

    def identify(self, lora_request: LoRARequest) -> Identity:
        """What a request asks for. Raises ValueError for a reference that is none."""

    def fetch(self, lora_request: LoRARequest, refresh: bool = False) -> Future[Any]:
        """Begin to bring the current version to this machine; ValueError in the future, if it can't
        be had, or not with this token. refresh: no answer counts that was asked for before."""

    def locate(self, files: Any) -> Future[str]:
        """The directory of an adapter of one part, which is fetched again where it has gone; it may
        go again when it has not been used for long. ValueError, in the future, as in `fetch`."""

    def num_pages(self, files: Any) -> int | None:
        """Pages of the image once it is in host memory; None while it is being read.

        Starts reading where nobody has yet; the files may be closed already, and are afterwards.
        Raises ValueError if the adapter cannot be served.
        """

    def traits(self, version: bytes) -> AdapterTraits:
        """Of an adapter that is in host memory."""

    def copy_to_pages(
        self, version: bytes, pages: list[int], after_steps: bool, before_steps: bool
    ) -> Future[None]:
        """Start copying the image into these pages of the pool.

        after_steps: not before the steps launched so far are done, which may use these pages.
        before_steps: steps launched from now on wait for it, on the device.
        """

    def holds(self, version: bytes) -> bool:
        """Whether the image is in host memory."""

    def read_interval(self, version: bytes) -> tuple[float, float]:
        """When an image that is in host memory was asked for, and was there: time.monotonic()."""

    def drop(self, version: bytes) -> None:
        """Forget the image."""

    def pin(self, version: bytes) -> None:
        """Never drop the image, which is in host memory, until `unpin`. Raises ValueError if there
        is no room for it."""

    def unpin(self, version: bytes) -> None:
        """It may be dropped again, if it is there."""

    def stats(self) -> dict[str, Any]:
        """Of host memory, disk and sources, under the names that users see."""

    def delete(self, files: Any) -> None:
        """Remove what was downloaded for it from the disk, when nobody reads it."""
