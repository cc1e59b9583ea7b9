"""KV memory: its shape, its price and its allocation."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
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
    """KV memory of `num_blocks` blocks for each layer index, all zero.

    Zero because kernels may multiply what lies behind a sequence's end by 0.
    Raises torch's out-of-memory error, or MemoryError, where the device has less.
    """
    size = (num_blocks, shape.block_size, shape.num_kv_heads, shape.head_dim)
    return {
        index: KVLayer(_zeros(size, shape.dtype, device), _zeros(size, shape.dtype, device))
        for index in layer_indexes
    }


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on a CPU from pages that the system hands out zeroed when they are first touched.

    `torch.zeros` writes all of them at once, which takes seconds for gigabytes.
    """
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    pages = np.zeros(math.prod(size) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(pages).view(dtype).view(size)
