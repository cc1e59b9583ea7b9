"""Attention over paged KV memory, one backend a kind of device, and the KV memory itself."""

import torch

from shardline_shards.attention.cpu import CpuBackend
from shardline_shards.attention.cuda import CudaBackend
from shardline_shards.attention.interface import AttentionBackend, KVLayer, PagedBatch
from shardline_shards.attention.memory import KVShape, allocate_kv
from shardline_shards.attention.pages import AHEAD_BYTES, PagesAhead
from shardline_shards.attention.reference import ReferenceBackend
from shardline_shards.attention.triton_backend import TritonBackend

__all__ = [
    "AHEAD_BYTES",
    "BACKENDS",
    "AttentionBackend",
    "KVLayer",
    "KVShape",
    "PagedBatch",
    "PagesAhead",
    "allocate_kv",
    "select_backend",
]

# Best first: the first that serves a device is taken.
BACKENDS: dict[str, AttentionBackend] = {
    "cuda": CudaBackend(),
    "triton": TritonBackend(),
    "cpu": CpuBackend(),
    "reference": ReferenceBackend(),
}


def select_backend(device: torch.device, dtype: torch.dtype) -> AttentionBackend:
    """The best backend that serves `device` and `dtype`; raises ValueError if none does."""
    for backend in BACKENDS.values():
        if backend.serves(device, dtype):
            return backend
    raise ValueError(
        f"no attention backend for {dtype} on {device}; use bfloat16, float16 or float32"
    )
