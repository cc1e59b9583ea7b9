"""KV memory as requests see it: block tables over the pool, and prefixes shared between them."""

from collections.abc import Iterable

from .blocks import BlockPool
from .prefix_cache import ROOT_DIGEST, block_digest
from .request import Request


class KvMemory:
    """Gives requests their blocks. A request gets the blocks of all its known tokens when it is
    admitted, and one more whenever a decode needs it; so a prefill that began never lacks memory.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_cache: bool) -> None:
        self.pool = BlockPool(num_blocks)
        self.num_prefix_queries = 0
        self.num_prefix_hits = 0
        self.block_size = block_size
        self._is_caching = enable_prefix_cache

    def find_prefix(self, request: Request) -> list[int]:
        """Blocks that already hold the beginning of the request, in order.

        They never cover its last token, because its logits are needed and only computing gives
        them; nor anything of a prompt whose logprobs are still to be told.
        """
        if not self._is_caching or request.needs_prompt_logits:
            return []
        prefix: list[int] = []
        num_blocks = (len(request.token_ids) - 1) // self.block_size
        for i in range(num_blocks):
            self._extend_digests(request, i + 1)
            block_id = self.pool.cache.find(request.block_digests[i])
            if block_id is None:
                break
            prefix.append(block_id)
        return prefix

    def can_admit(self, request: Request, prefix: list[int], num_spare_blocks: int) -> bool:
        """Whether all known tokens fit behind `prefix`, leaving `num_spare_blocks` to others."""
        num_shared = sum(map(self.pool.is_used, prefix))
        num_blocks = self._num_blocks_for(request) - num_shared
        return num_blocks + num_spare_blocks <= self.pool.num_available

    def admit(self, request: Request, prefix: list[int]) -> int:
        """Fill the empty block table; returns the number of tokens that `prefix` holds."""
        assert not request.block_table, f"request {request.request_id} has blocks already"
        self.pool.share(prefix)
        num_blocks = self._num_blocks_for(request) - len(prefix)
        request.block_table = prefix + self.pool.allocate(num_blocks)
        request.num_registered_blocks = len(prefix)
        num_cached_tokens = len(prefix) * self.block_size
        if self._is_caching and request.num_preemptions == 0 and not request.needs_prompt_logits:
            self.num_prefix_queries += request.num_prompt_tokens
            self.num_prefix_hits += num_cached_tokens
        return num_cached_tokens

    def lacks_block(self, request: Request) -> bool:
        """Whether the next token to be computed has no slot yet."""
        return request.num_computed_tokens >= len(request.block_table) * self.block_size

    def grow(self, request: Request) -> None:
        """One more block at the end of the table."""
        request.block_table += self.pool.allocate(1)

    def has_full_block(self, request: Request) -> bool:
        """Whether planned tokens fill a block that is not registered yet."""
        return self._num_full_blocks(request) > request.num_registered_blocks

    def register(self, request: Request) -> None:
        """Offer the blocks that the plan just made fills to all later plans.

        They are not written yet, but plans are executed in order: whoever finds them here is
        planned later, and so reads them later. Within one plan that would not hold, so this is
        called when the plan is complete; or when its last token is known, if that is later.
        """
        if not self._is_caching:
            return
        num_full = self._num_full_blocks(request)
        self._extend_digests(request, num_full)
        for i in range(request.num_registered_blocks, num_full):
            self.pool.cache.insert(request.block_digests[i], request.block_table[i])
        request.num_registered_blocks = num_full

    def register_late(self, requests: Iterable[Request]) -> None:
        """The last token of a block has come to each; if a step that reads it is in flight, the
        block is full.
        """
        for request in requests:
            if request.num_computed_tokens >= len(request.token_ids):
                self.register(request)

    def free(self, request: Request) -> None:
        """Give all blocks of the request back."""
        self.pool.free(request.block_table)
        request.block_table = []

    def forget_prefixes(self) -> None:
        """What the blocks hold is gone. Nobody uses any."""
        self.pool.forget_contents()

    def check(self, requests: Iterable[Request]) -> None:
        """Assert that no block leaks, `requests` being all that are alive."""
        self.pool.check(request.block_table for request in requests)

    def _num_full_blocks(self, request: Request) -> int:
        """Blocks of tokens that are known, and computed by what is planned."""
        return min(request.num_computed_tokens, len(request.token_ids)) // self.block_size

    def _num_blocks_for(self, request: Request) -> int:
        return -(-len(request.token_ids) // self.block_size)

    def _extend_digests(self, request: Request, num_blocks: int) -> None:
        digests, size = request.block_digests, self.block_size
        for i in range(len(digests), num_blocks):
            parent = digests[-1] if digests else ROOT_DIGEST
            digests.append(block_digest(parent, request.token_ids[i * size : (i + 1) * size]))
