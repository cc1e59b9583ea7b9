"""What changes logits before the temperature: biases, tokens that may not come yet, penalties."""

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shardline_shards.sampling.rows import SampleRow

_Entries = Mapping[int, Mapping[int, float]]  # row -> token id -> number


def adjust_logits(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Logits [rows, vocab] in fp32 after logit_bias, min_tokens and the penalties, in this order.

    `logits` are left as they are: a copy is made if, and only if, some row asks for a change.
    """
    own = [(i, row) for i, row in enumerate(rows) if row.adjusts_logits]
    biases = {i: row.sampling.logit_bias for i, row in own if row.sampling.logit_bias}
    forbidden = {i: _forbidden(row) for i, row in own if _is_short(row)}
    seen = {i: _seen(row) for i, row in own if row.sampling.repetition_penalty != 1.0}
    drawn = {i: _drawn(row) for i, row in own if _is_counted(row)}
    if not (biases or forbidden or seen or drawn):
        return logits.float()
    adjusted = logits.to(torch.float32, copy=True)
    _add(adjusted, biases)
    _add(adjusted, forbidden)
    _penalize_repetition(adjusted, seen)
    _add(adjusted, drawn)
    return adjusted


def _is_short(row: SampleRow) -> bool:
    return row.num_output_tokens < row.sampling.min_tokens


def _is_counted(row: SampleRow) -> bool:
    return row.sampling.presence_penalty != 0.0 or row.sampling.frequency_penalty != 0.0


def _forbidden(row: SampleRow) -> dict[int, float]:
    return dict.fromkeys(row.sampling.stop_token_ids, float("-inf"))


def _seen(row: SampleRow) -> dict[int, float]:
    return dict.fromkeys(row.token_ids, row.sampling.repetition_penalty)


def _drawn(row: SampleRow) -> dict[int, float]:
    """OpenAI's formula: frequency_penalty * count + presence_penalty, for tokens of the output."""
    counts = Counter(row.token_ids[row.num_prompt_tokens :])
    frequency, presence = row.sampling.frequency_penalty, row.sampling.presence_penalty
    return {token: -(frequency * count + presence) for token, count in counts.items()}


def _add(logits: Tensor, entries: _Entries) -> None:
    if entries:
        index, values = _scattered(logits, entries)
        logits.index_put_(index, values, accumulate=True)


def _penalize_repetition(logits: Tensor, entries: _Entries) -> None:
    """Positive logits of seen tokens are divided by the penalty, others multiplied.

    From CTRL (https://arxiv.org/abs/1909.05858), in the form that all servers use.
    """
    if entries:
        index, penalty = _scattered(logits, entries)
        seen = logits[index]
        logits.index_put_(index, torch.where(seen > 0, seen / penalty, seen * penalty))


def _scattered(logits: Tensor, entries: _Entries) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Row and token of each entry, int64, and the number that goes there."""
    rows = [row for row, numbers in entries.items() for _ in numbers]
    tokens = [token for numbers in entries.values() for token in numbers]
    numbers = [number for numbers in entries.values() for number in numbers.values()]
    index = torch.tensor([rows, tokens], dtype=torch.long, device=logits.device)
    return (index[0], index[1]), logits.new_tensor(numbers)
