"""KV memory that the system has yet to hand out, asked for while there is nothing else to do."""

import mmap
from collections.abc import Mapping

import torch

from shardline_shards.attention.interface import KVLayer

AHEAD_BYTES = 1 << 29
_PIECE_BYTES = 1 << 21  # a huge page


class PagesAhead:
    """Touches KV memory of a CPU, from its beginning to `ahead_bytes` behind the blocks in use.

    What first touches a page waits until it is zeroed, and on a virtual machine until the host has
    found one: 0.1 to 5 ms for 2 MB. Touching changes nothing, but nobody may write meanwhile.
    """

    def __init__(self, kv_layers: Mapping[int, KVLayer], ahead_bytes: int = AHEAD_BYTES) -> None:
        pool = next(iter(kv_layers.values())).key  # all layers share one memory
        memory = torch.empty(0, dtype=torch.uint8).set_(pool.untyped_storage())
        self._memory = memory.numpy()
        self._block_bytes = pool.stride(0) * pool.element_size()
        self._ahead_bytes = ahead_bytes
        self._num_touched_bytes = 0

    def are_wanted(self, num_blocks_used: int) -> bool:
        """Whether something is left to touch, while the first so many blocks have been used."""
        wanted = num_blocks_used * self._block_bytes + self._ahead_bytes
        return self._num_touched_bytes < min(wanted, self._memory.nbytes)

    def touch(self) -> None:
        """Touch one piece."""
        start = self._num_touched_bytes
        self._memory[start : start + _PIECE_BYTES : mmap.PAGESIZE] += 0
        self._num_touched_bytes = start + _PIECE_BYTES
