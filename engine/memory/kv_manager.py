"""KV blocks of requests: allocation, sharing and prefix cache. A block is a page. No torch.

A full block whose tokens are computed gets a key: a hash of all tokens up to its end and of the
adapter version that computed them, so that KV of one adapter can never serve another, and of the
request's cache_salt, so that those who have different ones share nothing. What comes
before the first token that an adapter acts on is the base model's, and shared with it.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from hashlib import blake2b

from loraplex.engine.memory.page_pool import PagePool, PageState
from loraplex.engine.request import Request

BlockHash = bytes


def hash_block(parent: BlockHash, token_ids: list[int]) -> BlockHash:
    """The key of a block: of its tokens and of everything before them."""
    return blake2b(parent + array("i", token_ids).tobytes(), digest_size=16).digest()


def hash_salt(salt: str) -> BlockHash:
    """What goes before the first block of requests with this salt."""
    return blake2b(salt.encode(), digest_size=16, person=b"cache_salt").digest() if salt else b""


class KVManager:
    """Gives requests their blocks and keeps those of finished ones while memory allows."""

    def __init__(
        self, pool: PagePool, block_size: int, enable_prefix_caching: bool, restore_cost: float
    ) -> None:
        """restore_cost: cost of computing the tokens of one block again (see Kind)."""
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._pool = pool
        self._lender = pool.add_lender(self)
        self._kind = pool.policy.add_kind(restore_cost)
        self._num_users = [0] * pool.num_pages
        self._page_of: dict[BlockHash, int] = {}
        self._hash_of: dict[int, BlockHash] = {}
        self._roots = [b""] * pool.num_pages  # Whose weights made the page's block.
        self._num_uses = [0] * pool.num_pages  # Requests that used the page's block so far.
        # The same of blocks that were reclaimed, oldest first: who computes one again goes on
        # from there.
        self._past_uses: OrderedDict[BlockHash, int] = OrderedDict()

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def find_prefix(self, request: Request) -> list[int]:
        """Pages of the longest computed prefix; one token at least stays to be computed."""
        needs_all = request.wants_prompt_logprobs or request.wire.sampling_params.pooling == "mean"
        if not self.enable_prefix_caching or needs_all:
            return []
        pages = []
        for block_hash in self._hashes(request, (request.num_tokens - 1) // self.block_size):
            page = self._page_of.get(block_hash)
            if page is None:
                break
            pages.append(page)
        return pages

    def num_pages_needed(self, prefix: list[int], num_tokens: int) -> int:
        """Pages that must come out of `num_available` to run `num_tokens` tokens on that prefix."""
        num_lent = sum(self._num_users[page] == 0 for page in prefix)
        return self.num_blocks_for(num_tokens) - len(prefix) + num_lent

    def take_prefix(self, request: Request, prefix: list[int]) -> None:
        """Make the request, which has no block yet, a user of the prefix's blocks."""
        assert not request.block_table
        for page in prefix:
            if self._num_users[page] == 0:
                self._pool.take_back(page)
                self._pool.set_state([page], PageState.KV)
            self._num_users[page] += 1
        request.block_table.extend(prefix)
        request.num_computed_tokens = len(prefix) * self.block_size
        request.num_keyed_blocks = len(prefix)

    def grow(self, request: Request, num_tokens: int) -> bool:
        """See to blocks for the request's first `num_tokens` tokens; False if memory lacks."""
        num_missing = self.num_blocks_for(num_tokens) - len(request.block_table)
        if num_missing <= 0:
            return True
        pages = self._pool.allocate(num_missing, PageState.KV)
        if pages is None:
            return False
        for page in pages:
            self._num_users[page] = 1
        request.block_table.extend(pages)
        return True

    def key_computed_blocks(self, request: Request) -> None:
        """Enter the blocks that became full into the prefix cache: those whose tokens are known
        and computed by steps that are launched, since later steps run behind those."""
        num_full = request.num_computed_tokens // self.block_size
        if not self.enable_prefix_caching or num_full <= request.num_keyed_blocks:
            return
        num_full = min(num_full, len(request.all_token_ids) // self.block_size)
        hashes = self._hashes(request, num_full)
        for index in range(request.num_keyed_blocks, num_full):
            block_hash, page = hashes[index], request.block_table[index]
            # Another request may have computed the same block meanwhile: then this one stays
            # private, and is freed with the request.
            if block_hash not in self._page_of:
                self._page_of[block_hash] = page
                self._hash_of[page] = block_hash
                is_base = (index + 1) * self.block_size <= request.adapter_start
                self._roots[page] = b"" if is_base else request.adapter_version
                self._num_uses[page] = self._past_uses.pop(block_hash, 0)
        request.num_keyed_blocks = num_full

    def release(self, request: Request) -> None:
        """Take the request off its blocks: keyed ones are lent to the cache, others freed.

        Steps in flight may still write to them: whoever gets them writes behind those.
        """
        pool, policy, kind = self._pool, self._pool.policy, self._kind
        num_users, num_uses = self._num_users, self._num_uses
        keyed = [page for page in reversed(request.block_table) if page in self._hash_of]
        for page in keyed:
            num_uses[page] += 1
        counts = Counter(map(num_uses.__getitem__, keyed))
        for uses, num_pages in counts.items():
            policy.record_use(kind, uses, num_pages)
        ranks = {uses: policy.rank(kind, uses) for uses in counts}
        cached, freed = [], []
        # The tail first, so that it is reclaimed before the head, which more prompts share.
        for page in reversed(request.block_table):
            num_users[page] -= 1
            if num_users[page] > 0:
                continue
            if page in self._hash_of:
                pool.lend(page, ranks[num_uses[page]], self._lender)
                cached.append(page)
            else:
                freed.append(page)
        pool.set_state(cached, PageState.KV_CACHED)
        pool.free(freed)
        request.block_table.clear()
        request.num_computed_tokens = 0
        request.num_keyed_blocks = 0

    def forget_prefixes(self, root: bytes | None = None) -> None:
        """Empty the prefix cache, or take from it what an adapter version computed. No request may
        have blocks of that."""
        pages = [page for page in self._hash_of if root in (None, self._roots[page])]
        for page in pages:
            self._pool.take_back(page)
            self.reclaim(page)
        self._pool.free(pages)

    def reclaim(self, page: int) -> list[int]:
        block_hash = self._hash_of.pop(page)
        del self._page_of[block_hash]
        self._past_uses[block_hash] = self._num_uses[page]
        if len(self._past_uses) > self._pool.num_pages:
            self._past_uses.popitem(last=False)
        return [page]

    def _hashes(self, request: Request, num_blocks: int) -> list[BlockHash]:
        """Keys of the request's first blocks, computed once and kept with the request."""
        hashes, size = request.block_hashes, self.block_size
        while len(hashes) < num_blocks:
            start = len(hashes) * size
            parent = hashes[-1] if hashes else hash_salt(request.wire.service.cache_salt)
            if start <= request.adapter_start < start + size:
                parent += request.adapter_version
            hashes.append(hash_block(parent, request.all_token_ids[start : start + size]))
        return hashes[:num_blocks]

    def check_integrity(self, requests: list[Request]) -> None:
        """Every KV page is exactly as used, keyed and lent as these running requests say."""
        users = [0] * self._pool.num_pages
        for request in requests:
            for page in request.block_table:
                users[page] += 1
        assert users == self._num_users
        for page in range(1, self._pool.num_pages):
            state = self._pool.state(page)
            assert (state is PageState.KV) == (users[page] > 0), page
            assert (state is PageState.KV_CACHED) == self._pool.is_lent(page), page
            assert state is not PageState.KV_CACHED or page in self._hash_of, page
        assert self._past_uses.keys().isdisjoint(self._page_of)
        assert {h: p for p, h in self._hash_of.items()} == self._page_of
