"""What computes the decoder layers of a stage in the place of the library's modules."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from shardline_shards.attention import PagedBatch


@dataclass(frozen=True, slots=True)
class Geometry:
    """What all layers of a stage have in common; heads are those of this rank."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """A layer's parameters, [out_features, in_features] as `nn.Linear` has them."""

    qkv: list[Tensor]
    output: Tensor
    gate_up: list[Tensor]
    down: Tensor
    input_norm: Tensor
    post_norm: Tensor
    qkv_bias: Tensor | None
    query_norm: Tensor | None
    key_norm: Tensor | None


@dataclass(frozen=True, slots=True)
class LayerKind:
    """How a layer calls attention."""

    scaling: float
    window: int | None
    softcap: float | None


class LayerStack(Protocol):
    """Layers one after the other, and on the last stage the norm and the head.

    `cos` and `sin` are fp32 [num_tokens, head_dim].
    """

    @property
    def num_layers(self) -> int:
        """How many have been added."""
        ...

    @property
    def sum_dtype(self) -> torch.dtype:
        """Dtype of what ranks sum."""
        ...

    def add_layer(self, weights: LayerWeights, kind: LayerKind) -> None:
        """The next layer; the stack has its own copy where it wants another form."""
        ...

    def set_head(self, norm: Tensor, head: Tensor) -> None:
        """What follows the last layer: `norm` [hidden_size], `head` [vocab_size, hidden_size]."""
        ...

    def run(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        paged: PagedBatch,
        indexes: Tensor | None,
        shared_memory: Any | None = None,
    ) -> Tensor:
        """All layers over `hidden` [num_tokens, hidden_size], and with `indexes` the head.

        Logits [len(indexes), vocab_size of this rank] then, else the hidden states. With
        `shared_memory`, sums go over the ranks that share it; without, there is one rank.
        """
        ...

    def run_half(
        self, states: Tensor, cos: Tensor, sin: Tensor, paged: PagedBatch, half: int, is_first: bool
    ) -> Tensor:
        """This rank's part of what follows `states`, both of `sum_dtype`; the sum is the next.

        Half 2i is the attention of layer i, half 2i + 1 its MLP. The first rank adds `states`.
        """
        ...

    def run_head(self, states: Tensor, indexes: Tensor) -> Tensor:
        """This rank's logits of some rows."""
        ...
