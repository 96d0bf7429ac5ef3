"""What must fit the pool, alone, lest somebody waits forever. No torch."""

from __future__ import annotations

from collections.abc import Iterable

from loraplex.engine.adapters.manager import AdapterManager
from loraplex.engine.errors import RequestError
from loraplex.engine.memory.kv_manager import KVManager
from loraplex.engine.memory.page_pool import PagePool
from loraplex.engine.request import Request


class Fitting:
    """Every request that is taken fits beside what is pinned, and nothing is pinned that would
    leave too little for one of them."""

    def __init__(
        self, pool: PagePool, kv: KVManager, adapters: AdapterManager, max_model_len: int
    ) -> None:
        self._pool = pool
        self._kv = kv
        self._adapters = adapters
        self._max_model_len = max_model_len

    def check(self, request: Request, num_adapter_pages: int) -> None:
        """Raises RequestError if a request does not fit with so many pages for its adapter."""
        num_pages = self._kv.num_blocks_for(request.max_num_tokens) + num_adapter_pages
        num_pinned = self._adapters.num_pinned_pages
        if num_pages > self._pool.num_usable - num_pinned:
            pinned = f", {num_pinned} of them for pinned adapters" if num_pinned else ""
            raise RequestError(
                f"prompt ({request.num_prompt_tokens} tokens) plus max_tokens "
                f"({request.wire.max_tokens}) and its adapter ({num_adapter_pages} pages) need "
                f"{num_pages} pages of the pool, which has {self._pool.num_usable}{pinned}: "
                "shorten the request or raise pool_bytes"
            )

    def check_adapter(self, name: str, num_pages: int, requests: Iterable[Request] | None) -> None:
        """Raises RequestError if an adapter of so many pages does not fit beside what is pinned;
        nor, if it is to be pinned itself, with the largest of the requests."""
        num_pinned = self._adapters.num_pinned_pages
        num_reserved = 0 if requests is None else self._num_reserved_pages(requests)
        if num_pages + num_pinned + num_reserved > self._pool.num_usable:
            raise RequestError(
                f"there is no room for adapter {name!r}: it takes {num_pages} pages, pinned "
                f"adapters take {num_pinned}, requests need up to {num_reserved}, and the pool has "
                f"{self._pool.num_usable}: unpin others or raise pool_bytes",
                status=409,
            )

    def _num_reserved_pages(self, requests: Iterable[Request]) -> int:
        """What the largest request, of these and of those that may come, needs alone."""
        longest = self._kv.num_blocks_for(self._max_model_len)
        needed = (
            self._kv.num_blocks_for(r.max_num_tokens) + self._num_pages_beside(r) for r in requests
        )
        return max(longest, *needed, 0)

    def _num_pages_beside(self, request: Request) -> int:
        """Of its adapter, as far as they are in the pool and not pinned there."""
        adapter = request.adapter
        return 0 if adapter is None or adapter.pinned_tier == "pool" else len(adapter.pages)
