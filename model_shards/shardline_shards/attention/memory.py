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

    Zero because kernels may multiply what lies behind a sequence's end by 0. On a CPU a block of
    all layers lies together: huge pages are then first touched one by one, as tokens come, where
    otherwise one step in thousands would touch a page of each layer, keys and values (0.1 s).
    Raises torch's out-of-memory error, or MemoryError, where the device has less.
    """
    indexes = list(layer_indexes)
    block = (shape.block_size, shape.num_kv_heads, shape.head_dim)
    if device.type == "cpu":
        memory = _untouched_zeros((num_blocks, len(indexes), 2, *block), shape.dtype)
        return {index: KVLayer(memory[:, i, 0], memory[:, i, 1]) for i, index in enumerate(indexes)}
    size = (num_blocks, *block)
    return {
        index: KVLayer(
            torch.zeros(size, dtype=shape.dtype, device=device),
            torch.zeros(size, dtype=shape.dtype, device=device),
        )
        for index in indexes
    }


def _untouched_zeros(size: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros from pages that the system hands out zeroed when they are first touched.

    `torch.zeros` writes all of them at once, which takes seconds for gigabytes.
    """
    pages = np.zeros(math.prod(size) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(pages).view(dtype).view(size)
