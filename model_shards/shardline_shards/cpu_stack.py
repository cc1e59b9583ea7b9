"""Decoder layers on a CPU, in one call of the kernel in `attention/csrc`."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shardline_shards.attention import KVLayer, PagedBatch
from shardline_shards.layer_stack import (
    Embedding,
    Geometry,
    LayerKind,
    LayerWeights,
    Rotation,
)


class CpuStack:
    """A LayerStack that packs its weights; logits and sums of ranks are fp32."""

    sum_dtype = torch.float32

    def __init__(self, geometry: Geometry) -> None:
        self._stack = torch.classes.shardline.DecoderStack(
            geometry.hidden_size,
            geometry.num_heads,
            geometry.num_kv_heads,
            geometry.head_dim,
            geometry.eps,
            geometry.dtype,
        )
        self._bound: Mapping[int, KVLayer] | None = None

    @property
    def num_layers(self) -> int:
        """See `LayerStack`."""
        return int(self._stack.num_layers())

    def add_layer(self, weights: LayerWeights, kind: LayerKind) -> None:
        """See `LayerStack.add_layer`."""
        self._stack.add_layer(
            weights.qkv,
            weights.output,
            weights.gate_up,
            weights.down,
            weights.input_norm,
            weights.post_norm,
            weights.qkv_bias,
            weights.query_norm,
            weights.key_norm,
            kind.scaling,
            kind.window,
        )

    def set_head(self, norm: Tensor, head: Tensor) -> None:
        """See `LayerStack.set_head`."""
        self._stack.set_head(norm, head)

    def run(
        self,
        hidden: Tensor | Embedding,
        rotation: Rotation,
        paged: PagedBatch,
        indexes: Tensor | None,
        shared_memory: Any | None = None,
    ) -> Tensor:
        """See `LayerStack.run`."""
        rows, token_ids = hidden, None
        if isinstance(hidden, Embedding):
            rows, token_ids = hidden.weight, hidden.token_ids
        output: Tensor = self._stack.run(
            rows, token_ids, *self._step(rotation, paged), indexes, shared_memory
        )
        return output

    def run_half(
        self, states: Tensor, rotation: Rotation, paged: PagedBatch, half: int, is_first: bool
    ) -> Tensor:
        """See `LayerStack.run_half`."""
        step = self._step(rotation, paged)
        part: Tensor = self._stack.run_half(states, *step, half, is_first)
        return part

    def run_head(self, states: Tensor, indexes: Tensor) -> Tensor:
        """See `LayerStack.run_head`."""
        logits: Tensor = self._stack.run_head(states, indexes)
        return logits

    def _step(self, rotation: Rotation, paged: PagedBatch) -> tuple[Tensor, ...]:
        """What the kernel is to know of a step beside its hidden states."""
        if self._bound is not paged.kv_layers:
            memory = [paged.kv_layers[index] for index in sorted(paged.kv_layers)]
            self._stack.bind_memory(
                [layer.key for layer in memory], [layer.value for layer in memory]
            )
            self._bound = paged.kv_layers
        paging = paged.query_start, paged.kv_lens, paged.block_tables, paged.slots
        return rotation.cos, rotation.sin, rotation.positions, *paging
