"""Log-probabilities as clients see them: of the model's own logits, before anything is changed."""

from collections.abc import Sequence

from torch import Tensor

from shardline_scheduler.plan import TokenLogprobs

_ROWS_AT_ONCE = 64


def token_logprobs(
    logits: Tensor, token_ids: Tensor, num_top: Sequence[int]
) -> list[TokenLogprobs]:
    """Natural log-probabilities of `token_ids` [rows], and of the `num_top[i]` likeliest of row i.

    `logits` [rows, vocab] of any float dtype; the log-softmax is taken in fp32.
    """
    raw = logits.float()
    best = raw.amax(-1, keepdim=True)  # subtracted first: a logprob near 0 keeps its digits
    log_total = (raw - best).exp_().sum(-1, keepdim=True).log_()
    chosen = (raw.gather(1, token_ids[:, None]) - best - log_total).squeeze(1).tolist()
    values, ids = raw.topk(min(max(num_top), raw.shape[-1]))
    tops = zip((values - best - log_total).tolist(), ids.tolist(), strict=True)
    return [
        TokenLogprobs(token, logprob, _ranked(top_values[:count], top_ids[:count]))
        for token, logprob, count, (top_values, top_ids) in zip(
            token_ids.tolist(), chosen, num_top, tops, strict=True
        )
    ]


def _ranked(values: list[float], ids: list[int]) -> list[tuple[int, float]]:
    return sorted(zip(ids, values, strict=True), key=lambda entry: (-entry[1], entry[0]))


def prompt_logprobs(logits: Tensor, target_ids: Tensor, top_n: int) -> list[TokenLogprobs]:
    """Logprobs of prompt tokens `target_ids` [n] under `logits` [n, vocab], each with its `top_n`.

    Row i of the logits is what the model says after the token before target i.
    """
    target_ids = target_ids.to(logits.device)
    result: list[TokenLogprobs] = []
    for start in range(0, len(target_ids), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        targets = target_ids[part]
        result += token_logprobs(logits[part], targets, [top_n] * len(targets))
    return result
