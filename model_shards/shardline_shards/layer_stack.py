"""What computes the decoder layers of a stage in the place of the library's modules."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
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


@dataclass(frozen=True)
class Rotation:
    """Tables of cosines and sines, fp32 [num_positions, head_dim], and where in them the step's
    tokens are, int64 [num_tokens].
    """

    cos: Tensor
    sin: Tensor
    positions: Tensor

    @cached_property
    def rows(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the tokens, [num_tokens, head_dim]; looked up once a step."""
        return self.cos[self.positions], self.sin[self.positions]


@dataclass(frozen=True, slots=True)
class Embedding:
    """What the first stage's hidden states are rows of, [vocab_size, hidden_size], and which, int64
    [num_tokens].
    """

    weight: Tensor
    token_ids: Tensor

    @property
    def shape(self) -> torch.Size:
        """Of the hidden states."""
        return torch.Size((len(self.token_ids), self.weight.shape[1]))

    def rows(self) -> Tensor:
        """The hidden states, [num_tokens, hidden_size]."""
        return F.embedding(self.token_ids, self.weight)


class LayerStack(Protocol):
    """Layers one after the other, and on the last stage the norm and the head."""

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
        hidden: Tensor | Embedding,
        rotation: Rotation,
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
        self, states: Tensor, rotation: Rotation, paged: PagedBatch, half: int, is_first: bool
    ) -> Tensor:
        """This rank's part of what follows `states`, both of `sum_dtype`; the sum is the next.

        Half 2i is the attention of layer i, half 2i + 1 its MLP. The first rank adds `states`.
        """
        ...

    def run_head(self, states: Tensor, indexes: Tensor) -> Tensor:
        """This rank's logits of some rows."""
        ...
