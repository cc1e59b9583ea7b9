"""What attention over paged KV memory looks like to everybody else: the data and the backend seam.

KV memory of one layer is a pool of blocks; a sequence owns blocks in any order, listed in its
block table.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class KVLayer:
    """One layer's `key` and `value`, each [num_blocks, block_size, num_kv_heads, head_dim].

    Both are dense within a block, and have one stride from block to block.
    """

    key: Tensor
    value: Tensor


class AttentionBackend(Protocol):
    """One way to write and read paged KV memory.

    `block_size` is the number of tokens in a block that the backend works best with.
    """

    name: str
    block_size: int

    def serves(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether this backend can run here on `device` with queries and KV memory of `dtype`."""
        ...

    def write(self, layer: KVLayer, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Store `key` and `value` [num_tokens, num_kv_heads, head_dim] at `slots`.

        `slots` is int64 [num_tokens]: block * block_size + offset, all distinct. The dtype is that
        of `layer`.
        """
        ...

    def attend(
        self,
        query: Tensor,
        layer: KVLayer,
        batch: "PagedBatch",
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Causal attention of `query` over KV memory; [num_tokens, num_heads, head_dim] in and out.

        Query token i of a sequence stands at position kv_len - query_len + i and sees key j iff
        j <= position, and position - j < sliding_window where one is set. With `softcap`, scores
        become softcap * tanh(scaling * q·k / softcap). The softmax is computed in fp32. Query
        head h reads KV head h // (num_heads / num_kv_heads).
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedBatch:
    """Where the tokens of one step live in KV memory; the sequences lie one after the other.

    query_start   int32 [num_seqs + 1], running total of the sequences' query tokens, from 0
    kv_lens       int32 [num_seqs], tokens of the sequence once this step is done
    block_tables  int32 [num_seqs, max_blocks], padded with 0
    slots         int64 [num_tokens], where each query token's key and value go
    max_query_len, max_kv_len   the largest of the batch
    kv_layers     KV memory by the model's layer index
    """

    query_start: Tensor
    kv_lens: Tensor
    block_tables: Tensor
    slots: Tensor
    max_query_len: int
    max_kv_len: int
    kv_layers: Mapping[int, KVLayer]
    backend: AttentionBackend
