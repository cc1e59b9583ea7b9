"""Time of paged attention on this CPU: the kernel, the reference, and torch's SDPA, which is dense.

    OMP_NUM_THREADS=2 python bench/attention.py [--dtype bfloat16]

The shapes are those of the demo model: 9 query heads, 3 KV heads of 64, 30 layers, each with KV
memory of its own, so that a decode finds nothing in the cache that the layer before has left there.
SDPA is given keys and values that already lie densely, for which a paged server would have to copy.
Times are the best of some rounds over all layers, in milliseconds for all layers together.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from shardline_shards.attention import (
    BACKENDS,
    KVLayer,
    KVShape,
    PagedBatch,
    allocate_kv,
    select_backend,
)

NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 30, 9, 3, 64
BLOCK_SIZE = 16
SCALING = HEAD_DIM**-0.5

# name: number of sequences, query tokens and tokens of each
CASES = {
    "decode, 32 sequences of 400": (32, 1, 400),
    "decode, 1 sequence of 400": (1, 1, 400),
    "decode, 1 sequence of 8192": (1, 1, 8192),
    "prompt of 256": (1, 256, 256),
    "512 tokens after 1536": (1, 512, 2048),
}


@dataclass(frozen=True)
class Layer:
    """One layer's input, in blocks and densely."""

    query: Tensor
    paged: KVLayer
    dense_query: Tensor
    dense_key: Tensor
    dense_value: Tensor


def make_layer(num_sequences: int, query_len: int, tables: Tensor, dtype: torch.dtype) -> Layer:
    shape = KVShape(
        block_size=BLOCK_SIZE, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM, dtype=dtype
    )
    (paged,) = allocate_kv([0], tables.numel(), shape, torch.device("cpu")).values()
    paged.key.normal_()
    paged.value.normal_()
    query = torch.randn(num_sequences * query_len, NUM_HEADS, HEAD_DIM).to(dtype)
    dense = (pool[tables.long()].flatten(1, 2).transpose(1, 2) for pool in (paged.key, paged.value))
    dense_query = query.unflatten(0, (num_sequences, query_len)).transpose(1, 2)
    return Layer(query, paged, dense_query.contiguous(), *(part.contiguous() for part in dense))


def make_batch(num_sequences: int, query_len: int, kv_len: int, tables: Tensor) -> PagedBatch:
    return PagedBatch(
        query_start=torch.arange(0, num_sequences * query_len + 1, query_len, dtype=torch.int32),
        kv_lens=torch.full((num_sequences,), kv_len, dtype=torch.int32),
        block_tables=tables,
        slots=torch.empty(0, dtype=torch.int64),
        max_query_len=query_len,
        max_kv_len=kv_len,
        kv_layers={},
        backend=BACKENDS["cpu"],
    )


def attend_paged(name: str, layer: Layer, batch: PagedBatch) -> Tensor:
    return BACKENDS[name].attend(
        layer.query, layer.paged, batch, scaling=SCALING, sliding_window=None, softcap=None
    )


def attend_dense(layer: Layer, mask: Tensor | None) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(
        layer.dense_query, layer.dense_key, layer.dense_value, attn_mask=mask, enable_gqa=True
    )


def best_ms(run: Callable[[], object], num_rounds: int) -> float:
    times = []
    for _ in range(num_rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


@torch.inference_mode()
def measure(name: str, dtype: torch.dtype) -> None:
    num_sequences, query_len, kv_len = CASES[name]
    num_blocks = num_sequences * kv_len // BLOCK_SIZE
    tables = torch.randperm(num_blocks, dtype=torch.int32).view(num_sequences, -1)
    layers = [make_layer(num_sequences, query_len, tables, dtype) for _ in range(NUM_LAYERS)]
    batch = make_batch(num_sequences, query_len, kv_len, tables)
    causal = torch.ones(query_len, kv_len, dtype=torch.bool).tril(kv_len - query_len)
    mask = causal if query_len > 1 else None

    def all_layers(attend: Callable[[Layer], Tensor]) -> Callable[[], object]:
        return lambda: [attend(layer) for layer in layers]

    kernel = best_ms(all_layers(lambda layer: attend_paged("cpu", layer, batch)), 15)
    others = {
        "SDPA": best_ms(all_layers(lambda layer: attend_dense(layer, mask)), 5),
        "reference": best_ms(all_layers(lambda layer: attend_paged("reference", layer, batch)), 2),
    }
    ratios = ", ".join(f"{other} {ms:.1f} ms ({ms / kernel:.1f}x)" for other, ms in others.items())
    read = 2 * num_sequences * kv_len * NUM_KV_HEADS * HEAD_DIM * dtype.itemsize * NUM_LAYERS
    bandwidth = f"  {read / kernel / 1e6:5.1f} GB/s" if query_len == 1 else ""
    print(f"{name:28} kernel {kernel:7.2f} ms{bandwidth:12}   {ratios}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    dtype = getattr(torch, parser.parse_args().dtype)
    backend = select_backend(torch.device("cpu"), dtype)
    if backend.name != "cpu":
        raise SystemExit("the kernel cannot be built here, there is nothing to compare")
    print(f"{dtype}, {torch.get_num_threads()} threads, {NUM_LAYERS} layers")
    for name in CASES:
        measure(name, dtype)


if __name__ == "__main__":
    main()
