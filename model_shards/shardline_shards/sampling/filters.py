"""min_p, top_k and top_p: which tokens may be drawn. Exact, whatever the distribution.

Each filter keeps a prefix of the tokens in the order (likeliest first, lowest id first). Safe
floors pick the few tokens that can matter; the prefix is then found by a histogram over those, and
nothing is sorted but the one bin in which it ends.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardline_shards.sampling.rows import SampleRow

_BINS_PER_NAT = 32
_NUM_BINS = 2048
_BLOCK = 32


@dataclass(frozen=True, slots=True)
class Candidates:
    """Tokens that may be drawn, ids ascending in a row; rows are padded with score -inf, weight 0.

    token_ids   int64 [rows, width]
    scores      fp32 [rows, width], logits after the temperature
    weights     fp64 [rows, width], their probabilities, 0 where filtered out
    """

    token_ids: Tensor
    scores: Tensor
    weights: Tensor


def has_filter(row: SampleRow) -> bool:
    """Whether min_p, top_k or top_p is set."""
    return row.sampling.min_p > 0 or row.sampling.top_k > 0 or row.sampling.top_p < 1


def filter_tokens(scores: Tensor, rows: Sequence[SampleRow]) -> Candidates:
    """What min_p, top_k and top_p, in this order, leave of `scores` [rows, vocab]: at least one."""
    probabilities = scores.softmax(-1)
    found = _gather(scores, probabilities, probabilities >= _floors(probabilities, rows))
    top_k = [row.sampling.top_k or scores.shape[-1] for row in rows]
    if min(top_k) < scores.shape[-1]:
        ones = torch.ones_like(found.weights)
        _drop_but(found, keep_prefix(found.scores, ones, _column(ones, top_k)))
    top_p = [row.sampling.top_p for row in rows]
    if min(top_p) < 1:
        left = found.weights.sum(-1, keepdim=True)
        left = torch.where(_column(left, [_is_narrowed(row) for row in rows]) > 0, left, 1.0)
        targets = left * _column(left, top_p)
        _drop_but(found, keep_prefix(found.scores, found.weights, targets))
    return found


def _is_narrowed(row: SampleRow) -> bool:
    return row.sampling.min_p > 0 or row.sampling.top_k > 0


def _drop_but(found: Candidates, kept: Tensor) -> None:
    found.weights.masked_fill_(~kept, 0)


def _floors(probabilities: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """A probability [rows, 1] under which a token is filtered out for sure.

    min_p (https://arxiv.org/abs/2407.01082) is such a floor itself. Of a top_p alone
    (https://arxiv.org/abs/1904.09751): the tokens under (1 - top_p) / vocab do not sum up to what
    may be missing. Of a top_k: k tokens at least reach the k-th largest of the blocks' maxima.
    """
    vocab_size = probabilities.shape[-1]
    best = probabilities.amax(-1, keepdim=True)
    floors = best * _column(best, [row.sampling.min_p for row in rows])
    spare = [0.0 if _is_narrowed(row) else 0.999 * (1 - row.sampling.top_p) for row in rows]
    floors = torch.maximum(floors, _column(best, spare) / vocab_size)
    top_k = [row.sampling.top_k for row in rows]
    if any(top_k):
        floors = torch.maximum(floors, _kth_maxima(probabilities, top_k))
    return floors


def _kth_maxima(probabilities: Tensor, top_k: list[int]) -> Tensor:
    """The k-th largest maximum [rows, 1] of blocks of tokens, 0 where k is 0 or too large."""
    maxima = in_blocks(probabilities, _BLOCK).amax(-1)
    within = [k if k <= maxima.shape[-1] else 0 for k in top_k]
    largest = maxima.topk(max(1, *within)).values
    places = torch.tensor(within, device=maxima.device)[:, None]
    return torch.where(places > 0, largest.gather(1, (places - 1).clamp_(min=0)), 0.0)


def in_blocks(weights: Tensor, size: int) -> Tensor:
    """`weights` [rows, n] as [rows, ceil(n / size), size], padded with 0 where need be."""
    missing = -weights.shape[-1] % size
    padded = torch.nn.functional.pad(weights, (0, missing)) if missing else weights
    return padded.view(len(weights), -1, size)


def _column(like: Tensor, numbers: Sequence[float]) -> Tensor:
    return like.new_tensor(numbers)[:, None]


def _gather(scores: Tensor, probabilities: Tensor, mask: Tensor) -> Candidates:
    flat = mask.flatten().nonzero().squeeze(1)
    row = flat // mask.shape[1]
    place, shape = _places(row, len(mask))
    into = row * shape[1] + place
    ids = torch.zeros(shape, dtype=torch.long, device=row.device)
    gathered = scores.new_full(shape, float("-inf"))
    weights = torch.zeros(shape, dtype=torch.float64, device=row.device)
    ids.view(-1)[into] = flat - row * mask.shape[1]
    gathered.view(-1)[into] = scores.flatten()[flat]
    weights.view(-1)[into] = probabilities.flatten()[flat].double()
    return Candidates(ids, gathered, weights)


def _places(row: Tensor, num_rows: int) -> tuple[Tensor, tuple[int, int]]:
    """For entries sorted by row: each one's number within its row, and the shape that holds all."""
    counts = torch.bincount(row, minlength=num_rows)
    starts = counts.cumsum(0) - counts
    place = torch.arange(len(row), device=row.device) - starts[row]
    return place, (num_rows, int(counts.max()))


def keep_prefix(scores: Tensor, weights: Tensor, targets: Tensor) -> Tensor:
    """Mask [rows, width] of each row's shortest prefix whose weights reach the row's target.

    `scores` [rows, width] give the order: highest first, lowest index first. `weights` fp64 are
    >= 0; `targets` fp64 [rows, 1] are > 0. Where the weights do not reach the target all are kept.
    """
    best = scores.amax(-1, keepdim=True)
    bins = (best - scores).mul_(_BINS_PER_NAT).clamp_(max=_NUM_BINS - 1).long()
    masses = weights.new_zeros((len(scores), _NUM_BINS)).scatter_add_(1, bins, weights)
    sums = masses.cumsum(1)
    last = torch.searchsorted(sums, targets).clamp_(max=_NUM_BINS - 1)
    missing = targets - (sums - masses).gather(1, last)
    kept = bins < last
    row, token = (bins == last).nonzero(as_tuple=True)
    if len(row):
        kept[row, token] = _is_needed(scores, weights, row, token, missing)
    return kept


def _is_needed(
    scores: Tensor, weights: Tensor, row: Tensor, token: Tensor, missing: Tensor
) -> Tensor:
    """Whether each entry (row, token) is in its row's shortest prefix that yields `missing`."""
    place, shape = _places(row, len(scores))
    keys = scores.new_full(shape, float("-inf"))
    keys[row, place] = scores[row, token]
    order = keys.argsort(dim=1, descending=True, stable=True)
    gains = weights.new_zeros(shape)
    gains[row, place] = weights[row, token]
    gains = gains.gather(1, order)
    is_needed = gains.cumsum(1) - gains < missing
    return torch.zeros_like(is_needed).scatter_(1, order, is_needed)[row, place]
