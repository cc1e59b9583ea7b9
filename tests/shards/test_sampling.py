"""The sampler against the rules written out for one row in plain Python."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shardline_scheduler.plan import SamplingParams
from shardline_shards.sampling import SampleRow, prompt_logprobs, sample
from shardline_shards.sampling.noise import uniform
from shardline_shards.sampling.sampler import invert


def row(token_ids: list[int] | None = None, num_prompt_tokens: int = 1, **kwargs) -> SampleRow:
    params = SamplingParams(max_tokens=100, **{"seed": 0, **kwargs})
    return SampleRow(params, [0] if token_ids is None else token_ids, num_prompt_tokens)


def draw(logits: Tensor, rows: list[SampleRow]) -> list[int]:
    return sample(logits, rows)[0]


def random_logits(num_rows: int, vocab_size: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, vocab_size, generator=generator) * scale


def adjusted_by_the_rules(logits: list[float], row: SampleRow) -> list[float]:
    params, scores = row.sampling, list(logits)
    output = list(row.token_ids[row.num_prompt_tokens :])
    for token, bias in params.logit_bias.items():
        scores[token] += bias
    if len(output) < params.min_tokens:
        for token in params.stop_token_ids:
            scores[token] = -math.inf
    for token in set(row.token_ids):
        penalty = params.repetition_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    for token, count in Counter(output).items():
        scores[token] -= params.frequency_penalty * count + params.presence_penalty
    return scores


def kept_by_the_rules(scores: list[float], params: SamplingParams) -> dict[int, float]:
    """Token ids that may be drawn, in vocabulary order, with their probabilities."""
    best = max(scores)
    weights = [math.exp((score - best) / params.temperature) for score in scores]
    order = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    least = params.min_p * max(weights)
    order = [token for token in order if weights[token] >= least]
    order = order[: params.top_k or len(order)]
    total, mass, kept = sum(weights[token] for token in order), 0.0, []
    for token in order:
        if params.top_p < 1 and mass >= params.top_p * total:
            break
        kept.append(token)
        mass += weights[token]
    return {token: weights[token] / mass for token in sorted(kept)}


def token_by_the_rules(logits: Tensor, row: SampleRow) -> int:
    scores = adjusted_by_the_rules(logits.tolist(), row)
    if row.sampling.temperature == 0:
        return scores.index(max(scores))
    kept = kept_by_the_rules(scores, row.sampling)
    noise, running = uniform(row.sampling.seed, row.num_output_tokens), 0.0
    for token, probability in kept.items():
        running += probability
        if running > noise:
            return token
    return max(kept)


params_strategy = st.fixed_dictionaries(
    {
        "seed": st.integers(-(2**63), 2**64 - 1),
        "temperature": st.sampled_from([0.0, 0.5, 1.0, 1.7]),
        "top_p": st.sampled_from([1.0, 1.0, 0.9, 0.5, 1e-9]),
        "top_k": st.sampled_from([0, 0, 1, 5, 40, 5000]),
        "min_p": st.sampled_from([0.0, 0.0, 0.02, 0.3, 1.0]),
        "presence_penalty": st.sampled_from([0.0, 1.5, -0.5]),
        "frequency_penalty": st.sampled_from([0.0, 0.5]),
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.8]),
        "logit_bias": st.sampled_from([{}, {1: 3.0}, {2: -100.0, 4: 1.5}]),
        "min_tokens": st.sampled_from([0, 8]),
    }
)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_every_row_of_a_mixed_batch_follows_the_rules(data: st.DataObject) -> None:
    vocab_size = data.draw(st.sampled_from([5, 40, 300, 3000]))
    num_rows = data.draw(st.integers(1, 6))
    logits = random_logits(num_rows, vocab_size, data.draw(st.integers(0, 999)), 3.0)
    logits = logits.to(data.draw(st.sampled_from([torch.float32, torch.bfloat16])))
    tokens = st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=20)
    rows = []
    for _ in range(num_rows):
        token_ids = data.draw(tokens)
        num_prompt = data.draw(st.integers(1, len(token_ids)))
        params = data.draw(params_strategy)
        rows.append(row(token_ids, num_prompt, stop_token_ids=(0, 3), **params))
    wanted = [token_by_the_rules(part, one) for part, one in zip(logits, rows, strict=True)]
    assert draw(logits, rows) == wanted


@pytest.mark.parametrize("scale", [0.3, 2.0, 8.0])
@pytest.mark.parametrize("top_p", [0.2, 0.9, 0.9999999])
def test_a_nucleus_of_a_large_vocabulary_follows_the_rules(scale: float, top_p: float) -> None:
    """Of a few tokens or of thousands, beside rows that have other filters too."""
    logits = random_logits(6, 20_001, seed=5, scale=scale)
    rows = [
        row(seed=1, top_p=top_p),
        row(seed=2, top_p=top_p, temperature=0.4),
        row(seed=3, top_p=top_p, top_k=150),
        row(seed=4, top_p=top_p, temperature=1.9),
        row(seed=5, top_p=top_p, min_p=0.1),
        row(seed=6, top_k=40, temperature=0.7),
    ]
    wanted = [token_by_the_rules(part, one) for part, one in zip(logits, rows, strict=True)]
    assert draw(logits, rows) == wanted


@pytest.mark.parametrize(
    "params",
    [{}, {"top_p": 0.8}, {"top_k": 7}, {"min_p": 0.1}, {"temperature": 0.6, "top_p": 0.95}],
)
def test_tokens_come_as_often_as_they_should(params: dict[str, float]) -> None:
    logits = random_logits(1, 50, seed=3)
    num_draws, counts = 20_000, Counter[int]()
    for start in range(0, num_draws, 500):
        rows = [row(seed=start + i, **params) for i in range(500)]
        counts.update(draw(logits.expand(500, -1), rows))
    expected = kept_by_the_rules(logits[0].tolist(), row(**params).sampling)
    assert set(counts) <= set(expected)
    chi_squared = sum(
        (counts[token] - num_draws * p) ** 2 / (num_draws * p) for token, p in expected.items()
    )
    freedom = max(1, len(expected) - 1)
    assert chi_squared < freedom + 4 * math.sqrt(2 * freedom)


def test_tokens_of_one_seed_come_as_often_as_they_should() -> None:
    logits = torch.tensor([[0.3, 0.5, 0.2]]).log()
    num_draws, counts = 20_000, Counter[int]()
    for start in range(0, num_draws, 200):
        rows = [row(token_ids=[0] * (1 + start % 1000 + i), seed=start // 1000) for i in range(200)]
        counts.update(draw(logits.expand(200, -1), rows))
    for token, share in enumerate((0.3, 0.5, 0.2)):
        assert counts[token] / num_draws == pytest.approx(share, abs=0.015)


def test_noise_is_even_and_differs_by_seed_and_index() -> None:
    by_index = [uniform(5, index) for index in range(10_000)]
    by_seed = [uniform(seed, 3) for seed in range(-5_000, 5_000)]
    for noise in (by_index, by_seed):
        assert len(set(noise)) == len(noise)
        assert min(noise) >= 0 and max(noise) < 1
        tenths = Counter(int(number * 10) for number in noise)
        assert all(abs(tenths[tenth] - 1000) < 150 for tenth in range(10))
    assert uniform(-1, 0) == uniform(2**64 - 1, 0)


def test_a_row_does_not_feel_its_neighbours() -> None:
    logits = random_logits(12, 997)
    rows = [
        row(seed=1, top_p=0.9),
        row(seed=2),
        row(seed=3, temperature=0.0),
        row(seed=4, top_k=20),
        row(seed=5, min_p=0.05, presence_penalty=1.0, token_ids=[0, 5, 5], num_logprobs=2),
        row(seed=6, top_k=900, top_p=0.99, temperature=1.4),
    ] * 2
    alone = [draw(logits[i : i + 1], [one])[0] for i, one in enumerate(rows)]
    assert draw(logits, rows) == alone
    assert draw(logits.flip(0), rows[::-1]) == alone[::-1]
    assert draw(logits[[0, 3, 7]], [rows[0], rows[3], rows[7]]) == [alone[i] for i in (0, 3, 7)]


def test_the_next_token_of_a_seed_is_drawn_anew() -> None:
    logits = random_logits(1, 1000, scale=0.5).expand(50, -1)
    rows = [row(token_ids=[0] * (index + 1), seed=9) for index in range(50)]
    assert len(set(draw(logits, rows))) > 40


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, 1.0, 2.0]])
    assert draw(logits, [row(temperature=0.0), row(temperature=1e-7)]) == [1, 0]


@pytest.mark.parametrize("params", [{"top_p": 1e-9}, {"top_k": 1}, {"top_k": 1, "top_p": 0.5}])
def test_the_narrowest_filters_are_greedy_even_among_equals(params: dict[str, float]) -> None:
    logits = random_logits(8, 600).bfloat16()
    logits[:, 100:110] = 11.0
    rows = [row(seed=seed, **params) for seed in range(8)]
    assert draw(logits, rows) == [100] * 8


def test_min_p_of_one_leaves_the_equals_of_the_likeliest() -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0, 4.999]]).expand(64, -1)
    assert set(draw(logits, [row(seed=seed, min_p=1.0) for seed in range(64)])) == {1, 2}


def test_a_top_k_beyond_the_vocabulary_filters_nothing() -> None:
    logits = random_logits(40, 30)
    wide = draw(logits, [row(seed=seed, top_k=31) for seed in range(40)])
    assert wide == draw(logits, [row(seed=seed) for seed in range(40)])


def test_a_flat_distribution_is_cut_exactly() -> None:
    logits = torch.zeros(200, 4096)
    tokens = draw(logits, [row(seed=seed, top_p=0.25) for seed in range(200)])
    assert max(tokens) < 1024
    assert len(set(tokens)) > 150


@pytest.mark.parametrize("params", [{"top_k": 10}, {"top_p": 10.001 / 300}])
def test_nearly_equal_tokens_are_told_apart(params: dict[str, float]) -> None:
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    logits = torch.empty(1, 300)
    logits[0, order] = torch.arange(300) * -1e-6 + 1
    tokens = draw(logits.expand(100, -1), [row(seed=seed, **params) for seed in range(100)])
    assert set(tokens) <= set(order[:11].tolist())
    assert len(set(tokens)) > 8


def test_top_p_counts_from_what_top_k_left() -> None:
    """Though the many small ones are far below what top_p alone would look at."""
    shares = [0.85, 0.06] + [0.09 / 998] * 998
    logits = torch.tensor([shares]).log().expand(64, -1)
    tokens = draw(logits, [row(seed=seed, top_k=999, top_p=0.9) for seed in range(64)])
    assert set(tokens) == {0, 1}


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 700), num_zeros=st.integers(0, 300), seed=st.integers(0, 999))
def test_no_noise_picks_a_weightless_token(size: int, num_zeros: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(4, size, generator=generator) + 1e-3
    weights = torch.nn.functional.pad(weights, (num_zeros, num_zeros))
    noise = torch.tensor([0.0, 1 - 2**-53, 0.5, 2**-53], dtype=torch.float64)
    index = invert(weights, noise)
    assert (weights.gather(1, index[:, None]) > 0).all()
    assert index[0] == num_zeros
    assert index[1] == num_zeros + size - 1


def test_stop_tokens_cannot_come_before_min_tokens() -> None:
    logits = torch.tensor([[0.0, 50.0, 1.0]]).expand(3, -1)
    rows = [
        row(token_ids=[0, 2], min_tokens=2, stop_token_ids=(1,), temperature=0.0),
        row(token_ids=[0, 2, 2], min_tokens=2, stop_token_ids=(1,), temperature=0.0),
        row(token_ids=[0, 2], min_tokens=2, stop_token_ids=(1,), seed=3),
    ]
    first, second, third = draw(logits, rows)
    assert (first, second) == (2, 1)
    assert third != 1


def test_penalties_by_hand() -> None:
    logits = torch.tensor([[3.0, 2.5, -1.0]])
    drawn_twice = {"token_ids": [1, 0, 0], "temperature": 0.0}
    assert draw(logits, [row(**drawn_twice, presence_penalty=0.4)]) == [0]
    assert draw(logits, [row(**drawn_twice, frequency_penalty=0.4)]) == [1]
    assert draw(logits, [row(**drawn_twice, repetition_penalty=1.1)]) == [0]
    assert draw(logits, [row(**drawn_twice, repetition_penalty=2.0, logit_bias={2: 2.6})]) == [2]


def test_a_bias_of_100_forces_and_of_minus_100_forbids() -> None:
    logits = random_logits(100, 20)
    forced = draw(logits, [row(seed=seed, logit_bias={7: 100.0}) for seed in range(100)])
    assert set(forced) == {7}
    forbidden = dict.fromkeys(range(10), -100.0)
    left = draw(logits, [row(seed=seed, logit_bias=forbidden) for seed in range(100)])
    assert min(left) >= 10


def test_logprobs_are_those_of_the_logits_as_they_came() -> None:
    logits = random_logits(3, 40).bfloat16()
    rows = [
        row(num_logprobs=40, temperature=0.3, logit_bias={5: 100.0}),
        row(),
        row(num_logprobs=0, temperature=0.0),
    ]
    expected = logits.float().log_softmax(-1)
    (biased, _, best), logprobs = sample(logits, rows)
    assert logprobs.keys() == {0, 2}
    assert biased == 5
    all_of_it, bare = logprobs[0], logprobs[2]
    assert all_of_it.logprob == pytest.approx(expected[0, 5].item(), abs=1e-5)
    assert sum(math.exp(logprob) for _, logprob in all_of_it.top) == pytest.approx(1.0, abs=1e-5)
    assert [logprob for _, logprob in all_of_it.top] == sorted(
        (logprob for _, logprob in all_of_it.top), reverse=True
    )
    for token, logprob in all_of_it.top:
        assert logprob == pytest.approx(expected[0, token].item(), abs=1e-5)
    assert (bare.token_id, bare.top) == (best, [])
    assert bare.logprob == pytest.approx(expected[2].max().item(), abs=1e-5)


def test_prompt_logprobs_are_those_of_the_targets() -> None:
    logits = random_logits(150, 33)
    targets = torch.randint(33, (150,), generator=torch.Generator().manual_seed(1))
    expected = logits.log_softmax(-1)
    result = prompt_logprobs(logits, targets, 2)
    assert [entry.token_id for entry in result] == targets.tolist()
    for entry, row_logprobs, target in zip(result, expected, targets, strict=True):
        assert entry.logprob == pytest.approx(row_logprobs[target].item(), abs=1e-5)
        best = row_logprobs.topk(2)
        assert [token for token, _ in entry.top] == best.indices.tolist()
        assert [logprob for _, logprob in entry.top] == pytest.approx(
            best.values.tolist(), abs=1e-5
        )
    assert prompt_logprobs(logits[:0], targets[:0], 2) == []


def test_a_logprob_near_zero_keeps_its_digits() -> None:
    _, logprobs = sample(torch.tensor([[30.0, 20.0]]), [row(temperature=0.0, num_logprobs=1)])
    assert logprobs[0].logprob == pytest.approx(-math.log1p(math.exp(-10)), rel=1e-3)


def test_the_logits_are_left_alone() -> None:
    logits = random_logits(2, 50)
    before = logits.clone()
    sample(
        logits,
        [
            row(logit_bias={1: 5.0}, repetition_penalty=1.5, num_logprobs=1),
            row(top_p=0.5, temperature=0.7, frequency_penalty=1.0),
        ],
    )
    assert torch.equal(logits, before)


def test_a_broken_row_does_not_break_the_others(caplog: pytest.LogCaptureFixture) -> None:
    logits = random_logits(6, 50)
    whole = draw(logits, [row(seed=seed, top_p=0.9 if seed % 2 else 1.0) for seed in range(6)])
    logits[2] = math.nan
    logits[3] = math.nan
    rows = [row(seed=seed, top_p=0.9 if seed % 2 else 1.0) for seed in range(6)]
    tokens = draw(logits, rows)
    assert tokens[:2] + tokens[4:] == whole[:2] + whole[4:]
    assert "not finite" in caplog.text


def test_no_rows_give_no_tokens() -> None:
    assert sample(torch.empty(0, 10), []) == ([], {})
