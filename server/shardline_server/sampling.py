"""From a request's fields to `SamplingParams`: the one mapping that both doors use."""

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from shardline_scheduler.plan import SamplingParams
from shardline_server.errors import InvalidRequest, PromptTooLong
from shardline_server.request_fields import MAX_SEED, SamplingFields

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingDefaults:
    """What a request that says nothing gets: the model's own values where it has any."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelLimits:
    """What a request is checked against. `max_model_len` counts prompt and output together."""

    max_model_len: int
    vocab_size: int
    eos_token_ids: frozenset[int] = frozenset()
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)


def to_sampling_params(
    fields: SamplingFields, *, num_prompt_tokens: int, limits: ModelLimits, default_max_tokens: int
) -> SamplingParams:
    """The parameters of choice 0; choice i has `seed + i` (see `choice_seed`).

    Raises InvalidRequest or PromptTooLong, naming the field, where the model cannot do it.
    """
    max_tokens = _max_tokens(fields, num_prompt_tokens, limits, default_max_tokens)
    min_tokens = fields.min_tokens or 0
    if min_tokens > max_tokens:
        message = f"min_tokens ({min_tokens}) is more than max_tokens ({max_tokens})."
        raise InvalidRequest(message, param="min_tokens")
    check_token_ids(fields.stop_token_ids or (), limits.vocab_size, param="stop_token_ids")
    check_token_ids(fields.logit_bias or (), limits.vocab_size, param="logit_bias")
    defaults = limits.defaults
    return SamplingParams(
        max_tokens=max_tokens,
        seed=secrets.randbits(63) if fields.seed is None else fields.seed & MAX_SEED,
        temperature=_default(fields.temperature, defaults.temperature),
        top_p=_default(fields.top_p, defaults.top_p),
        top_k=max(0, _default(fields.top_k, defaults.top_k)),
        min_p=_default(fields.min_p, defaults.min_p),
        presence_penalty=fields.presence_penalty or 0.0,
        frequency_penalty=fields.frequency_penalty or 0.0,
        repetition_penalty=_default(fields.repetition_penalty, defaults.repetition_penalty),
        logit_bias=fields.logit_bias or {},
        min_tokens=min_tokens,
        stop_token_ids=_stop_token_ids(fields, limits),
        num_logprobs=fields.num_logprobs,
        num_prompt_logprobs=fields.num_prompt_logprobs,
    )


def choice_seed(seed: int, choice: int) -> int:
    """The seed of one of a prompt's `n` choices; other prompts of the request play no part."""
    return (seed + choice) & MAX_SEED


def check_token_ids(token_ids: Iterable[int], vocab_size: int, *, param: str) -> None:
    """Raises InvalidRequest that names the first id outside the vocabulary."""
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            message = (
                f"{param}: token id {token_id} is not in the vocabulary (0 to {vocab_size - 1})."
            )
            raise InvalidRequest(message, param=param)


def check_prompt(token_ids: Sequence[int], limits: ModelLimits, *, param: str = "prompt") -> None:
    """Raises InvalidRequest for an empty prompt or an unknown token id."""
    if not token_ids:
        raise InvalidRequest(f"{param} is empty; at least one token is needed.", param=param)
    if min(token_ids) < 0 or max(token_ids) >= limits.vocab_size:
        check_token_ids(token_ids, limits.vocab_size, param=param)


def _max_tokens(
    fields: SamplingFields, num_prompt_tokens: int, limits: ModelLimits, default_max_tokens: int
) -> int:
    room = limits.max_model_len - num_prompt_tokens
    if room < 1:
        raise PromptTooLong(
            f"The prompt has {num_prompt_tokens} tokens, and this model's context window holds "
            f"{limits.max_model_len}: a prompt may have at most {limits.max_model_len - 1} tokens.",
            param="prompt",
        )
    asked = fields.requested_max_tokens
    if asked is not None and asked > room:
        raise PromptTooLong(
            f"max_tokens is {asked} and the prompt has {num_prompt_tokens} tokens, but this "
            f"model's context window holds {limits.max_model_len}: max_tokens may be at most "
            f"{room} here.",
            param="max_tokens",
        )
    return min(default_max_tokens, room) if asked is None else asked


def _stop_token_ids(fields: SamplingFields, limits: ModelLimits) -> tuple[int, ...]:
    of_model = frozenset() if fields.ignore_eos else limits.eos_token_ids
    return tuple(sorted(of_model.union(fields.stop_token_ids or ())))


def _default(value: T | None, default: T) -> T:
    return default if value is None else value
