"""The pool of fixed-size KV blocks: who is free, who is used how often, who is worth keeping.

A block is free (its content is worthless), cached (no request uses it, but the prefix cache knows
its content, until it is evicted) or used (by one request or more).

Plans are executed strictly in order on every worker, so a block may be handed out again as soon as
it is given back here: the steps in flight that still touch it run before the step that gets it.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from .prefix_cache import PrefixCache


class BlockPool:
    """`num_blocks` blocks with reference counts; every operation is O(1) a block."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.cache = PrefixCache()
        self._ref_counts = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        # Least recently used first. A dict would do, but for finding its first key in O(1).
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_available(self) -> int:
        """Blocks that can be allocated now: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody uses and whose content is known."""
        return len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks that some request uses."""
        return self.num_blocks - self.num_available

    def is_used(self, block_id: int) -> bool:
        """Whether some request uses the block."""
        return self._ref_counts[block_id] > 0

    def allocate(self, num_blocks: int) -> list[int]:
        """Blocks to write into, each used once; cached ones are evicted when no free one is left.

        The caller has made sure that `num_available` suffices.
        """
        assert num_blocks <= self.num_available, f"{num_blocks} of {self.num_available} blocks"
        block_ids = [self._free.pop() if self._free else self._evict() for _ in range(num_blocks)]
        for block_id in block_ids:
            self._ref_counts[block_id] = 1
        return block_ids

    def share(self, block_ids: Iterable[int]) -> None:
        """Use blocks of the prefix cache once more."""
        for block_id in block_ids:
            if not self._ref_counts[block_id]:
                del self._cached[block_id]
            self._ref_counts[block_id] += 1

    def free(self, block_table: Sequence[int]) -> None:
        """Use each block once less; the last user leaves a known content to the cache."""
        # The end of a prefix is worth nothing without its beginning, so it must be evicted first.
        for block_id in reversed(block_table):
            assert self._ref_counts[block_id] > 0, f"block {block_id} is freed twice"
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id]:
                continue
            if block_id in self.cache:
                self._cached[block_id] = None
            else:
                self._free.append(block_id)

    def forget_contents(self) -> None:
        """Nothing is worth keeping any more; no block is used."""
        assert not self.num_used, f"{self.num_used} blocks are used"
        while self._cached:
            self._free.append(self._evict())

    def check(self, block_tables: Iterable[Sequence[int]]) -> None:
        """Assert that nothing leaks: the tables of all live requests explain every count."""
        uses = Counter(block_id for table in block_tables for block_id in table)
        free = set(self._free)
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & self._cached.keys(), "a block is free and cached"
        assert len(free) + len(self._cached) + len(uses) == self.num_blocks, (
            f"{len(free)} free + {len(self._cached)} cached + {len(uses)} used "
            f"!= {self.num_blocks} blocks"
        )
        for block_id, num_uses in uses.items():
            assert self._ref_counts[block_id] == num_uses, (
                f"block {block_id} has {self._ref_counts[block_id]} references, "
                f"{num_uses} tables name it"
            )
        assert sum(self._ref_counts) == uses.total(), "a block has references that no table names"
        assert self._cached.keys() <= self.cache.block_ids(), "a block is cached but unknown"
        assert free.isdisjoint(self.cache.block_ids()), "a block is free but known"

    def _evict(self) -> int:
        block_id, _ = self._cached.popitem(last=False)
        self.cache.remove(block_id)
        return block_id
