"""Paged attention on NVIDIA GPUs, by the FlashAttention that torch ships.

`torch.nn.attention.varlen` has block tables from torch 2.12 on; before that Triton's kernels run.
What its kernel (FlashAttention 2) asks for: compute capability 8.0, bf16 or fp16, head_dim a
multiple of 8 up to 256, blocks of a multiple of 256 tokens, and `cu_seq_k` even where `seqused_k`
says it all. It has no soft cap: layers with one (gemma2) are Triton's too, or the reference's.
"""

import functools
import inspect

import torch
from torch import Tensor

from shardline_shards.attention.interface import KVLayer, PagedBatch
from shardline_shards.attention.reference import ReferenceBackend
from shardline_shards.attention.triton_backend import TritonBackend, has_triton


class CudaBackend:
    """FlashAttention over block tables.

    It is never split over keys, so that a row's result is its own, whatever else the batch holds.
    """

    name = "cuda"
    block_size = 256

    def __init__(self) -> None:
        self._triton = TritonBackend()
        self._reference = ReferenceBackend()

    def serves(self, device: torch.device, dtype: torch.dtype) -> bool:
        """GPUs from compute capability 8.0 on, in half precision."""
        if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
            return False
        return torch.cuda.get_device_capability(device) >= (8, 0) and has_paging()

    def write(self, layer: KVLayer, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """See `AttentionBackend.write`."""
        layer.key.view(-1, *key.shape[1:]).index_copy_(0, slots, key)
        layer.value.view(-1, *value.shape[1:]).index_copy_(0, slots, value)

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
        if softcap is not None:
            capping = self._triton if has_triton() else self._reference
            return capping.attend(
                query,
                layer,
                batch,
                scaling=scaling,
                sliding_window=sliding_window,
                softcap=softcap,
            )
        from torch.nn.attention.varlen import varlen_attn

        output = varlen_attn(
            query,
            layer.key,
            layer.value,
            batch.query_start,
            torch.nn.functional.pad(batch.kv_lens.cumsum(0, dtype=torch.int32), (1, 0)),
            batch.max_query_len,
            batch.max_kv_len,
            scale=scaling,
            window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
            enable_gqa=query.shape[1] != layer.key.shape[2],
            seqused_k=batch.kv_lens,
            block_table=batch.block_tables,
            num_splits=1,
        )
        assert isinstance(output, Tensor)  # a tuple only where the log-sum-exp is asked for
        return output


@functools.cache
def has_paging() -> bool:
    """Whether this torch's `varlen_attn` takes block tables."""
    # Imported late: it brings the compiler along, two seconds that a CPU never needs.
    from torch.nn.attention.varlen import varlen_attn

    return "block_table" in inspect.signature(varlen_attn).parameters
