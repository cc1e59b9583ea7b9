"""Paged attention as the formula says it: one sequence at a time, any device, any dtype, slow."""

import torch
from torch import Tensor

from shardline_shards.attention.interface import KVLayer, PagedBatch


class ReferenceBackend:
    """What the other backends are tested against, and what runs where none of them can."""

    name = "reference"
    block_size = 16

    def serves(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Any device, any floating dtype."""
        return dtype.is_floating_point

    def write(self, layer: KVLayer, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """See `AttentionBackend.write`."""
        block_size = layer.key.shape[1]
        places = slots // block_size, slots % block_size
        layer.key[places] = key
        layer.value[places] = value

    def attend(
        self,
        query: Tensor,
        layer: KVLayer,
        batch: PagedBatch,
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """See `AttentionBackend.attend`."""
        output = torch.empty_like(query)
        starts = batch.query_start.tolist()
        for sequence, kv_len in enumerate(batch.kv_lens.tolist()):
            rows = slice(starts[sequence], starts[sequence + 1])
            blocks = batch.block_tables[sequence].long()
            output[rows] = _attend_sequence(
                query[rows],
                _gather(layer.key, blocks, kv_len),
                _gather(layer.value, blocks, kv_len),
                scaling,
                sliding_window,
                softcap,
            )
        return output


def _gather(pool: Tensor, blocks: Tensor, kv_len: int) -> Tensor:
    num_blocks = -(-kv_len // pool.shape[1])
    return pool[blocks[:num_blocks]].flatten(0, 1)[:kv_len]


def _attend_sequence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """`query` [query_len, num_heads, head_dim]; `key`, `value` [kv_len, num_kv_heads, head_dim]."""
    group = query.shape[1] // key.shape[1]
    wide_key = key.float().repeat_interleave(group, dim=1)
    wide_value = value.float().repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query.float(), wide_key) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    visible = _visible(query.shape[0], key.shape[0], sliding_window, query.device)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, wide_value).to(query.dtype)


def _visible(
    query_len: int, kv_len: int, sliding_window: int | None, device: torch.device
) -> Tensor:
    position = torch.arange(kv_len - query_len, kv_len, device=device)[:, None]
    distance = position - torch.arange(kv_len, device=device)[None, :]
    visible = distance >= 0
    return visible if sliding_window is None else visible & (distance < sliding_window)
