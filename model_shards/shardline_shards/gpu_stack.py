"""Decoder layers on a GPU: four products a layer, and a kernel for all that lies between two."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shardline_shards.attention import KVLayer, PagedBatch
from shardline_shards.attention.triton_backend import power_of_two
from shardline_shards.layer_stack import (
    Embedding,
    Geometry,
    LayerKind,
    LayerWeights,
    Rotation,
)

_HEADS = 8  # that one program turns
_COLUMNS = 1024  # that one program activates


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer's parameters; what is multiplied with the same rows is one matrix."""

    qkv: Tensor
    qkv_bias: Tensor | None
    output: Tensor
    gate_up: Tensor
    down: Tensor
    input_norm: Tensor
    post_norm: Tensor
    query_norm: Tensor | None
    key_norm: Tensor | None
    kind: LayerKind


class GpuStack:
    """A LayerStack by torch's products and Triton's kernels; logits have the dtype of the model."""

    def __init__(self, geometry: Geometry) -> None:
        from shardline_shards import layer_kernels

        self._kernels = layer_kernels
        self._geometry = geometry
        self._layers: list[_Layer] = []
        self._norm: Tensor | None = None
        self._head: Tensor | None = None
        self.sum_dtype = geometry.dtype

    @property
    def num_layers(self) -> int:
        """See `LayerStack`."""
        return len(self._layers)

    def add_layer(self, weights: LayerWeights, kind: LayerKind) -> None:
        """See `LayerStack.add_layer`."""
        layer = _Layer(
            qkv=torch.cat(weights.qkv),
            qkv_bias=weights.qkv_bias,
            output=weights.output,
            gate_up=torch.cat(weights.gate_up),
            down=weights.down,
            input_norm=weights.input_norm,
            post_norm=weights.post_norm,
            query_norm=weights.query_norm,
            key_norm=weights.key_norm,
            kind=kind,
        )
        self._layers.append(layer)

    def set_head(self, norm: Tensor, head: Tensor) -> None:
        """See `LayerStack.set_head`."""
        self._norm, self._head = norm, head

    def run(
        self,
        hidden: Tensor | Embedding,
        rotation: Rotation,
        paged: PagedBatch,
        indexes: Tensor | None,
        shared_memory: Any | None = None,
    ) -> Tensor:
        """See `LayerStack.run`; GPUs share no memory."""
        assert shared_memory is None
        if isinstance(hidden, Embedding):
            hidden = hidden.rows()
        cos, sin = rotation.rows
        memory = _memory(paged)
        delta: Tensor | None = None
        for layer, kv_layer in zip(self._layers, memory, strict=True):
            hidden, normed = self._add_norm(hidden, delta, layer.input_norm)
            delta = self._attend(layer, kv_layer, normed, cos, sin, paged)
            hidden, normed = self._add_norm(hidden, delta, layer.post_norm)
            delta = self._multiply(layer, normed)
        if indexes is None:
            return hidden if delta is None else hidden + delta
        return self._logits(hidden[indexes], None if delta is None else delta[indexes])

    def run_half(
        self, states: Tensor, rotation: Rotation, paged: PagedBatch, half: int, is_first: bool
    ) -> Tensor:
        """See `LayerStack.run_half`."""
        index, is_mlp = divmod(half, 2)
        layer = self._layers[index]
        norm = layer.post_norm if is_mlp else layer.input_norm
        _, normed = self._add_norm(states, None, norm)
        if is_mlp:
            part = self._multiply(layer, normed)
        else:
            cos, sin = rotation.rows
            part = self._attend(layer, _memory(paged)[index], normed, cos, sin, paged)
        return states + part if is_first else part

    def run_head(self, states: Tensor, indexes: Tensor) -> Tensor:
        """See `LayerStack.run_head`."""
        return self._logits(states[indexes], None)

    def _logits(self, hidden: Tensor, delta: Tensor | None) -> Tensor:
        assert self._norm is not None and self._head is not None
        _, normed = self._add_norm(hidden, delta, self._norm)
        return F.linear(normed, self._head)

    def _add_norm(
        self, hidden: Tensor, delta: Tensor | None, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`hidden + delta`, and that normed."""
        normed = torch.empty_like(hidden)
        summed = hidden if delta is None else torch.empty_like(hidden)
        count, width = hidden.shape
        if count:
            self._kernels.add_norm[(count,)](
                summed, normed, hidden, delta, weight, width, self._geometry.eps,
                delta is not None, power_of_two(width), num_warps=8 if width > 2048 else 4,
            )  # fmt: skip
        return summed, normed

    def _attend(
        self,
        layer: _Layer,
        kv_layer: KVLayer,
        normed: Tensor,
        cos: Tensor,
        sin: Tensor,
        paged: PagedBatch,
    ) -> Tensor:
        geometry = self._geometry
        qkv = F.linear(normed, layer.qkv, layer.qkv_bias)
        num_heads, head_dim = geometry.num_heads, geometry.head_dim
        num_kv_heads = geometry.num_kv_heads
        num_parts = -(-(num_heads + 2 * num_kv_heads) // _HEADS)
        has_norms = layer.query_norm is not None
        self._kernels.rotate_and_write[(len(qkv), num_parts)](
            qkv, kv_layer.key, kv_layer.value, cos, sin, layer.query_norm, layer.key_norm,
            paged.slots, geometry.eps, kv_layer.key.stride(0), num_heads, num_kv_heads, head_dim,
            power_of_two(head_dim // 2), kv_layer.key.shape[1], has_norms, _HEADS, num_warps=4,
        )  # fmt: skip
        attended = paged.backend.attend(
            qkv[:, : num_heads * head_dim].view(-1, num_heads, head_dim),
            kv_layer,
            paged,
            scaling=layer.kind.scaling,
            sliding_window=layer.kind.window,
            softcap=layer.kind.softcap,
        )
        return F.linear(attended.view(len(qkv), -1), layer.output)

    def _multiply(self, layer: _Layer, normed: Tensor) -> Tensor:
        gate_up = F.linear(normed, layer.gate_up)
        count, num_columns = len(gate_up), gate_up.shape[1] // 2
        active = gate_up.new_empty(count, num_columns)
        self._kernels.multiply_silu[(count, -(-num_columns // _COLUMNS))](
            active, gate_up, num_columns, _COLUMNS, num_warps=4
        )
        return F.linear(active, layer.down)


def _memory(paged: PagedBatch) -> list[KVLayer]:
    return [paged.kv_layers[index] for index in sorted(paged.kv_layers)]
