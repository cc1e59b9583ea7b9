"""min_p, top_k and top_p: which tokens may be drawn. Exact, whatever the distribution.

Each filter keeps a prefix of the tokens in the order (likeliest first, lowest id first). Floors,
found among the maxima of blocks of tokens, pick the few tokens that can matter; the prefix is then
found by a histogram over those, and nothing is sorted but the one bin in which it ends.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, log

import torch
from torch import Tensor

from shardline_shards.sampling.rows import SampleRow

_BINS_PER_NAT = 32
_NUM_BINS = 2048
_ROUNDING = 1e-5  # far above what probabilities in fp32 are off by, all together
_BLOCK = 64
_USUAL_NUCLEUS = 128  # What stands for a top_p is first looked for among so many blocks' maxima.


@dataclass(frozen=True, slots=True)
class Candidates:
    """Tokens that may be drawn, ids ascending in a row; rows are padded with score -inf, weight 0.

    token_ids   int64 [rows, width]
    scores      fp32 [rows, width], logits before the temperature
    weights     fp64 [rows, width], their likelihood beside the best one's, 0 where filtered out
    """

    token_ids: Tensor
    scores: Tensor
    weights: Tensor


@dataclass(frozen=True, slots=True)
class _Blocks:
    """All tokens of some rows: fp32 scores [rows, blocks, block], the blocks' maxima [rows,
    blocks]; of the rows the best score and the temperature [rows, 1].
    """

    scores: Tensor
    maxima: Tensor
    best: Tensor
    temperatures: Tensor


def has_filter(row: SampleRow) -> bool:
    """Whether min_p, top_k or top_p is set."""
    return _is_narrowed(row) or row.sampling.top_p < 1


def filter_tokens(scores: Tensor, rows: Sequence[SampleRow]) -> Candidates:
    """What min_p, top_k and top_p, in this order, leave: at least one token.

    `scores` fp32 [rows, vocab] are logits before the temperature, which every row has (> 0).
    """
    found, totals = _find(scores, rows)
    top_k = [row.sampling.top_k or scores.shape[-1] for row in rows]
    if min(top_k) < scores.shape[-1]:
        ones = torch.ones_like(found.weights)
        _drop_but(found, keep_prefix(found.scores, ones, _column(ones, top_k)))
    top_p = [row.sampling.top_p for row in rows]
    if min(top_p) < 1:
        left = torch.where(totals > 0, totals, found.weights.sum(-1, keepdim=True))
        targets = left * _column(left, top_p)
        _drop_but(found, keep_prefix(found.scores, found.weights, targets))
    return found


def _is_narrowed(row: SampleRow) -> bool:
    return row.sampling.min_p > 0 or row.sampling.top_k > 0


def _drop_but(found: Candidates, kept: Tensor) -> None:
    found.weights.masked_fill_(~kept, 0)


def _find(scores: Tensor, rows: Sequence[SampleRow]) -> tuple[Candidates, Tensor]:
    """All that can be left, and the weight of all tokens, fp64 [rows, 1]: 0 where nobody asks."""
    blocks = _in_blocks_of(scores, rows)
    floors = _floors(blocks, rows)
    found = _above(blocks, floors)
    totals = found.weights.new_zeros(len(rows), 1)
    alone = [i for i, row in enumerate(rows) if not _is_narrowed(row)]
    if not alone:
        return found, totals
    part = scores if len(alone) == len(rows) else scores[alone]
    temperatures = blocks.temperatures[alone]
    shares = (part if (temperatures == 1).all() else part / temperatures).softmax(-1)
    totals[alone] = shares.amax(-1, keepdim=True).double().reciprocal()
    top_p = _column(totals, [rows[i].sampling.top_p for i in alone])
    is_short = found.weights[alone].sum(-1, keepdim=True) < totals[alone] * top_p
    if short := is_short[:, 0].nonzero()[:, 0].tolist():
        each = (part, shares, temperatures, top_p)
        # One at a time: temporaries of many rows come from fresh pages, which cost four times this.
        for i in short:
            floors[alone[i]] = _nucleus_floor(*(x[i : i + 1] for x in each))
        found = _above(blocks, floors)
    return found, totals


def _in_blocks_of(scores: Tensor, rows: Sequence[SampleRow]) -> _Blocks:
    blocks = in_blocks(scores, _BLOCK, padding=-inf)
    maxima = blocks.amax(-1)
    temperatures = _column(scores, [row.sampling.temperature for row in rows])
    return _Blocks(blocks, maxima, maxima.amax(-1, keepdim=True), temperatures)


def _floors(blocks: _Blocks, rows: Sequence[SampleRow]) -> Tensor:
    """A score [rows, 1] under which a token is filtered out: for sure, but for a top_p alone.

    min_p (https://arxiv.org/abs/2407.01082) is such a floor itself. Of a top_k: k tokens at least
    reach the k-th largest of the blocks' maxima. A top_p (https://arxiv.org/abs/1904.09751) alone
    gets as many as are usual.
    """
    nats = [log(min_p) if (min_p := row.sampling.min_p) > 0 else -inf for row in rows]
    floors = blocks.best + blocks.temperatures * _column(blocks.best, nats)
    counts = [row.sampling.top_k if _is_narrowed(row) else _USUAL_NUCLEUS for row in rows]
    floors = torch.maximum(floors, _kth_maxima(blocks.maxima, counts))
    return floors.clamp_(min=torch.finfo(floors.dtype).min)


def _nucleus_floor(scores: Tensor, shares: Tensor, temperatures: Tensor, top_p: Tensor) -> Tensor:
    """A score [rows, 1] such that all of that and above have the row's top_p for sure."""
    best = scores.amax(-1, keepdim=True)
    bins = _bins(scores, best, temperatures)
    masses = top_p.new_zeros(len(scores), _NUM_BINS).scatter_add_(1, bins, shares.double())
    last = torch.searchsorted(masses.cumsum(1), top_p + _ROUNDING)
    floors = best - temperatures * ((last + 2) / _BINS_PER_NAT)  # one more bin than is needed
    return torch.where(last < _NUM_BINS - 1, floors, torch.finfo(floors.dtype).min)


def _kth_maxima(maxima: Tensor, counts: list[int]) -> Tensor:
    """The k-th largest [rows, 1] of `maxima` [rows, blocks], -inf where k is 0 or too large."""
    within = [k if k <= maxima.shape[-1] else 0 for k in counts]
    largest = maxima.topk(max(1, *within)).values
    places = torch.tensor(within, device=maxima.device)[:, None]
    return torch.where(places > 0, largest.gather(1, (places - 1).clamp_(min=0)), -inf)


def in_blocks(weights: Tensor, size: int, padding: float = 0.0) -> Tensor:
    """`weights` [rows, n] as [rows, ceil(n / size), size], padded where need be."""
    missing = -weights.shape[-1] % size
    if missing:
        weights = torch.nn.functional.pad(weights, (0, missing), value=padding)
    return weights.view(len(weights), -1, size)


def _column(like: Tensor, numbers: Sequence[float]) -> Tensor:
    return like.new_tensor(numbers)[:, None]


def _above(blocks: _Blocks, floors: Tensor) -> Candidates:
    """The tokens whose scores reach their row's floor."""
    row, block = (blocks.maxima >= floors).nonzero(as_tuple=True)
    scores = blocks.scores[row, block]
    index, lane = (scores >= floors[row]).nonzero(as_tuple=True)
    row = row[index]
    place, shape = _places(row, len(floors))
    ids = torch.zeros(shape, dtype=torch.long, device=row.device)
    ids[row, place] = block[index] * _BLOCK + lane
    gathered = scores.new_full(shape, -inf)
    gathered[row, place] = scores[index, lane]
    weights = ((gathered - blocks.best).double() / blocks.temperatures).exp_()
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
    bins = _bins(scores, best)
    masses = weights.new_zeros((len(scores), _NUM_BINS)).scatter_add_(1, bins, weights)
    sums = masses.cumsum(1)
    last = torch.searchsorted(sums, targets).clamp_(max=_NUM_BINS - 1)
    missing = targets - (sums - masses).gather(1, last)
    kept = bins < last
    row, token = (bins == last).nonzero(as_tuple=True)
    if len(row):
        kept[row, token] = _is_needed(scores, weights, row, token, missing)
    return kept


def _bins(scores: Tensor, best: Tensor, temperatures: Tensor | float = 1.0) -> Tensor:
    """The number of each score's bin, int64; the best ones' is 0."""
    below = (best - scores).mul_(_BINS_PER_NAT / temperatures)
    return below.clamp_(max=_NUM_BINS - 1).long()


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
