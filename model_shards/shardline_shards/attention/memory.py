"""KV memory: its shape, its price and its allocation."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from shardline_shards.attention.interface import KVLayer


@dataclass(frozen=True, slots=True, kw_only=True)
class KVShape:
    """What one block of one layer holds on this rank."""

    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in one layer, key and value together."""
        return 2 * self.block_size * self.num_kv_heads * self.head_dim * self.dtype.itemsize


def allocate_kv(
    layer_indexes: Iterable[int], num_blocks: int, shape: KVShape, device: torch.device
) -> dict[int, KVLayer]:
    """KV memory of `num_blocks` blocks for each layer index, set to zero.

    Zeroed because kernels may multiply what lies behind a sequence's end by 0, and because pages
    that do not exist are then found missing now and not under load.
    Raises torch's out-of-memory error where the device has less.
    """
    size = (num_blocks, shape.block_size, shape.num_kv_heads, shape.head_dim)

    def pool() -> torch.Tensor:
        return torch.zeros(size, dtype=shape.dtype, device=device)

    return {index: KVLayer(pool(), pool()) for index in layer_indexes}
