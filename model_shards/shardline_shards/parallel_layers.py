"""The few layers that talk over the tensor axis.

Column-parallel layers do not: they are plain, narrower `nn.Linear`s.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shardline_shards.collectives import Collectives


class RowParallelLinear(nn.Linear):
    """A linear layer that holds some input columns: `sum over ranks(x_r @ W_r^T) + bias`.

    Input [..., in_features of this rank], output [..., out_features], the same on every rank.
    The bias is whole on every rank and added after the sum.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, tp: Collectives) -> None:
        super().__init__(in_features, out_features, bias=bias, device="meta")
        self.tp = tp

    def forward(self, input: Tensor) -> Tensor:
        """See the class."""
        output = self.tp.all_reduce(F.linear(input, self.weight))
        return output if self.bias is None else output + self.bias


class GatheredLinear(nn.Linear):
    """A linear layer that holds some output rows; rank 0 gets all outputs, the others only theirs.

    Used for the head: only tp rank 0 samples, so only it needs the logits of the whole vocabulary.
    """

    def __init__(self, in_features: int, sizes: list[int], bias: bool, tp: Collectives) -> None:
        super().__init__(in_features, sizes[tp.rank], bias=bias, device="meta")
        self.sizes = sizes
        self.tp = tp

    def forward(self, input: Tensor) -> Tensor:
        """Input [..., in_features]; output [..., sum(sizes)] on rank 0, else [..., sizes[rank]]."""
        return self.tp.gather_last_dim(super().forward(input), self.sizes)


class HeadSplitRMSNorm(nn.Module):
    """RMS norm over all heads of the model, when this rank holds only some of them.

    `x * rsqrt(mean(x^2) + eps) * weight` with the mean over the whole width (Zhang & Sennrich 2019,
    "Root Mean Square Layer Normalization"). Replicated heads count once: only owners add theirs.
    """

    def __init__(
        self, width: int, full_width: int, eps: float, is_owner: bool, tp: Collectives
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, device="meta"))
        self.full_width = full_width
        self.eps = eps
        self.is_owner = is_owner
        self.tp = tp

    def forward(self, input: Tensor) -> Tensor:
        """Input and output [..., width of this rank]."""
        x = input.to(torch.float32)
        squares = x.pow(2).sum(-1, keepdim=True) * self.is_owner
        mean = self.tp.all_reduce(squares) / self.full_width
        return (self.weight * (x * torch.rsqrt(mean + self.eps))).to(input.dtype)


class VocabParallelEmbedding(nn.Module):
    """An embedding that holds some vocabulary rows; ranks add up what each of them looks up.

    Wraps the model's own module, because some models scale inside a subclass of `nn.Embedding`.
    """

    def __init__(self, inner: nn.Embedding, rows: range, tp: Collectives) -> None:
        super().__init__()
        inner.weight = nn.Parameter(inner.weight.new_empty(len(rows), inner.embedding_dim))
        inner.num_embeddings = len(rows)
        inner.padding_idx = None
        self.inner = inner
        self.rows = rows
        self.tp = tp

    def forward(self, input_ids: Tensor) -> Tensor:
        """Input int64 [...], output [..., hidden], the same on every rank."""
        is_foreign = (input_ids < self.rows.start) | (input_ids >= self.rows.stop)
        local_ids = (input_ids - self.rows.start).masked_fill(is_foreign, 0)
        embedded = self.inner(local_ids).masked_fill(is_foreign.unsqueeze(-1), 0)
        return self.tp.all_reduce(embedded)


class SkippedLayer(nn.Module):
    """Stands where another stage's layer would be, so that layer numbers stay the model's own."""

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        """The hidden states, untouched."""
        return hidden_states
