"""The one mapping from fields to SamplingParams, and the checks against the model."""

import pytest

from shardline_scheduler.plan import SamplingParams
from shardline_server.errors import InvalidRequest, PromptTooLong
from shardline_server.request_fields import ChatFields, CompletionFields
from shardline_server.sampling import (
    ModelLimits,
    SamplingDefaults,
    check_prompt,
    choice_seed,
    to_sampling_params,
)

LIMITS = ModelLimits(max_model_len=100, vocab_size=50, eos_token_ids=frozenset({2, 7}))


def params(fields, *, num_prompt_tokens=10, limits=LIMITS, default_max_tokens=16):
    return to_sampling_params(
        fields,
        num_prompt_tokens=num_prompt_tokens,
        limits=limits,
        default_max_tokens=default_max_tokens,
    )


def test_every_field_arrives():
    fields = CompletionFields(
        max_tokens=5,
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.1,
        seed=7,
        stop_token_ids=[5],
        min_tokens=2,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        repetition_penalty=1.1,
        logit_bias={3: -100.0},
        logprobs=4,
        echo=True,
    )
    assert params(fields) == SamplingParams(
        max_tokens=5,
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.1,
        seed=7,
        stop_token_ids=(2, 5, 7),
        min_tokens=2,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        repetition_penalty=1.1,
        logit_bias={3: -100.0},
        num_logprobs=4,
        num_prompt_logprobs=4,
    )


def test_what_is_not_said_is_the_models_own_value():
    defaults = SamplingDefaults(temperature=0.6, top_p=0.95, top_k=20, repetition_penalty=1.05)
    limits = ModelLimits(max_model_len=100, vocab_size=50, defaults=defaults)
    got = params(CompletionFields(), limits=limits)
    assert (got.temperature, got.top_p, got.top_k) == (0.6, 0.95, 20)
    assert got.repetition_penalty == 1.05
    assert got.num_logprobs is None
    explicit = params(CompletionFields(temperature=0.0, top_p=1.0, top_k=-1), limits=limits)
    assert (explicit.temperature, explicit.top_p, explicit.top_k) == (0.0, 1.0, 0)


def test_ignore_eos_leaves_only_the_clients_own_stop_tokens():
    assert params(CompletionFields(ignore_eos=True)).stop_token_ids == ()
    assert params(CompletionFields(ignore_eos=True, stop_token_ids=[7])).stop_token_ids == (7,)


def test_chat_logprobs_are_two_fields():
    assert params(ChatFields(logprobs=True, top_logprobs=3)).num_logprobs == 3
    assert params(ChatFields(logprobs=True)).num_logprobs == 0
    assert params(ChatFields(logprobs=False)).num_logprobs is None


def test_without_a_seed_one_is_drawn_and_choices_count_on():
    assert params(CompletionFields()).seed != params(CompletionFields()).seed
    assert params(CompletionFields(seed=-1)).seed == 2**63 - 1
    assert [choice_seed(5, i) for i in range(3)] == [5, 6, 7]
    assert choice_seed(2**63 - 1, 1) == 0


def test_max_tokens_absent_is_the_default_or_what_still_fits():
    assert params(CompletionFields()).max_tokens == 16
    assert params(CompletionFields(), num_prompt_tokens=95).max_tokens == 5
    assert params(CompletionFields(max_completion_tokens=90)).max_tokens == 90


@pytest.mark.parametrize("asked", [91, 2**31, 2**70])
def test_more_than_fits_is_refused_with_what_would_fit(asked):
    with pytest.raises(PromptTooLong, match="at most 90 here") as caught:
        params(CompletionFields(max_tokens=asked))
    assert caught.value.param == "max_tokens"


def test_a_prompt_that_fills_the_window_is_refused_with_its_limit():
    with pytest.raises(PromptTooLong, match="at most 99 tokens") as caught:
        params(CompletionFields(), num_prompt_tokens=100)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (CompletionFields(stop_token_ids=[50]), "stop_token_ids"),
        (CompletionFields(logit_bias={50: 1.0}), "logit_bias"),
        (CompletionFields(logit_bias={-1: 1.0}), "logit_bias"),
        (CompletionFields(min_tokens=17), "min_tokens"),
    ],
)
def test_what_this_model_cannot_do_is_refused(fields, param):
    with pytest.raises(InvalidRequest) as caught:
        params(fields)
    assert caught.value.param == param


def test_prompts_are_checked_for_length_and_vocabulary():
    check_prompt([0, 49], LIMITS)
    with pytest.raises(InvalidRequest, match="empty"):
        check_prompt([], LIMITS)
    with pytest.raises(InvalidRequest, match=r"token id 50 .* \(0 to 49\)"):
        check_prompt([3, 50], LIMITS)
