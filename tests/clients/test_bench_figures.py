"""What `shardline bench` plans and counts, without a server."""

import random
from array import array
from itertools import islice, pairwise
from statistics import fmean, stdev

import pytest

from shardline_client.bench.arrivals import read_trace
from shardline_client.bench.capacity import TARGETS, Capacity, find_capacities
from shardline_client.bench.classes import UNLIMITED, RequestClass, parse_class
from shardline_client.bench.judgement import is_met, num_late_tokens
from shardline_client.bench.load import plan
from shardline_client.bench.options import BenchOptions
from shardline_client.bench.prompts import TextPrompts, TokenPrompts
from shardline_client.bench.records import Outcome, Record
from shardline_client.bench.summary import Distribution, summarize

PROMPTS = TokenPrompts([5, 6, 7, 8])


def record(start_s=0.0, times=(1.0,), outcome=Outcome.OK, num_output_tokens=None, **fields):
    return Record(
        start_s=start_s,
        sent_s=start_s,
        end_s=times[-1],
        outcome=outcome,
        token_times_s=array("d", times),
        token_counts=fields.pop("counts", array("H", [1] * len(times))),
        num_prompt_tokens=10,
        num_output_tokens=num_output_tokens or len(times),
        **fields,
    )


def planned(options, seed, num_requests=2000, **pace):
    return list(islice(plan(options, PROMPTS, seed, **pace), num_requests))


def test_the_latencies_of_a_request():
    one = record(2.0, (3.0, 3.5, 5.0), num_output_tokens=5)
    assert (one.ttft_s, one.e2e_s) == (1.0, 3.0)
    assert one.tpot_s == (5.0 - 3.0) / 4
    assert one.itl_s == [0.5, 1.5]
    assert record(times=(1.0,)).tpot_s is None


def test_percentiles_are_interpolated():
    assert Distribution.of([]) is None
    assert Distribution.of([0.002]) == Distribution(mean=2.0, p50=2.0, p90=2.0, p99=2.0)
    hundred_and_one = [i / 1000 for i in range(101)]
    assert Distribution.of(hundred_and_one) == Distribution(
        mean=pytest.approx(50), p50=50, p90=90, p99=99
    )


def test_only_requests_that_ended_well_count():
    refused = record(times=(9.0,), outcome=Outcome.REFUSED, retry_after_s=3.0)
    failed = record(times=(8.0,), outcome=Outcome.FAILED)
    records = [record(0.0, (1.0, 2.0)), record(1.0, (2.0, 10.0)), refused, failed]
    summary = summarize(records, 10.0, [UNLIMITED])
    assert (summary.num_ok, summary.num_refused, summary.num_failed) == (2, 1, 1)
    assert summary.offered_per_s == 4 / 10
    assert summary.output_tokens_per_s == 4 / 10
    assert summary.total_tokens_per_s == 24 / 10
    assert summary.requests_per_s == 2 / 10
    assert summary.ttft_ms.mean == 1000
    assert summary.refusal_ms.p99 == 9000
    assert (summary.num_retry_after, summary.retry_after_ms.p50) == (1, 3000)
    assert summarize([], 0.0, [UNLIMITED]).requests_per_s == 0


@pytest.mark.parametrize(
    ("limits", "is_kept"),
    [
        ({}, True),
        ({"ttft_ms": 1000, "tpot_ms": 500, "deadline_ms": 2000}, True),
        ({"ttft_ms": 999}, False),
        ({"tpot_ms": 499}, False),
        ({"deadline_ms": 1999}, False),
    ],
)
def test_a_budget_is_kept_as_a_whole(limits, is_kept):
    wanted = RequestClass(name="standard", **limits)
    times = (2.0, 2.25, 3.0)
    assert is_met(record(1.0, times), wanted) is is_kept
    for outcome in (Outcome.REFUSED, Outcome.EXPIRED, Outcome.FAILED):
        assert not is_met(record(1.0, times, outcome), wanted)


def test_every_token_has_a_deadline_of_its_own():
    """A stall in the middle is late by token, whatever the mean says."""
    wanted = RequestClass(name="interactive", ttft_ms=1000, tpot_ms=100)
    stalled = record(times=(0.9, 1.0, 1.15, 1.9, 1.95, 2.0))
    assert is_met(stalled, RequestClass(name="interactive", ttft_ms=1000, tpot_ms=250))
    # Due at 1.0, 1.1, 1.2, 1.3, 1.4, 1.5.
    assert num_late_tokens(stalled, wanted) == 3
    assert num_late_tokens(stalled, RequestClass(name="batch")) == 0
    assert num_late_tokens(stalled, RequestClass(name="batch", ttft_ms=800)) == 1
    assert num_late_tokens(stalled, RequestClass(name="batch", deadline_ms=1920)) == 2
    # Counted from the first token where that has no limit: due at 0.9, 1.0, 1.1, 1.2, 1.3, 1.4.
    assert num_late_tokens(stalled, RequestClass(name="batch", tpot_ms=100)) == 4


@pytest.mark.parametrize(
    ("counts", "num_output_tokens", "num_late"),
    [
        ((1, 4), 5, 2),  # at 1.25 tokens 2 to 5 come; those due at 1.1 and 1.2 are late
        ((4, 1), 5, 0),
        ((1, 1), 5, 1),  # three tokens unaccounted for: pieces of two and a half
    ],
)
def test_tokens_that_come_together_are_judged_one_by_one(counts, num_output_tokens, num_late):
    wanted = RequestClass(name="interactive", ttft_ms=1000, tpot_ms=100)
    bundled = record(
        times=(0.9, 1.25), num_output_tokens=num_output_tokens, counts=array("H", counts)
    )
    assert num_late_tokens(bundled, wanted) == num_late


def test_attainment_is_of_all_that_was_offered():
    fast = RequestClass(name="interactive", ttft_ms=1000)
    slow = RequestClass(name="batch", ttft_ms=5000)
    records = [
        record(times=(0.5,), class_name="interactive", is_told_met=True),
        record(times=(2.0,), class_name="interactive", is_told_met=True),
        record(outcome=Outcome.REFUSED, class_name="interactive"),
        record(times=(4.0,), class_name="batch"),
        record(times=(0.1,), outcome=Outcome.EXPIRED, class_name="batch"),
    ]
    summary = summarize(records, 10.0, [fast, slow])
    assert summary.budget.attainment == 2 / 5
    assert summary.budget.admitted_attainment == 2 / 4
    assert summary.budget.schedule_attainment == 2 / 5
    assert summary.budget.goodput_per_s == 2 / 10
    assert (summary.budget.num_told, summary.budget.num_agreed) == (2, 1)
    assert summary.num_expired == 1
    interactive = summary.budget_by_class["interactive"]
    assert (interactive.num_offered, interactive.attainment) == (3, 1 / 3)
    assert summary.budget_by_class["batch"].admitted_attainment == 1 / 2


def test_the_same_seed_plans_the_same_load():
    options = BenchOptions(rates=(5,), prompt_tokens=(3, 9), output_tokens=(1, 4))
    load = planned(options, 1, rate=5)
    assert load == planned(options, 1, rate=5) != planned(options, 2, rate=5)
    assert {len(request.prompt) for request in load} == set(range(3, 10))
    assert {request.num_output_tokens for request in load} == {1, 2, 3, 4}
    twice = planned(options, 1, rate=10)
    for slow, fast in zip(load, twice, strict=True):
        assert fast.arrival_s == pytest.approx(slow.arrival_s / 2)
        assert len(fast.prompt) == len(slow.prompt)
    assert [one.prompt for one in load] != [one.prompt for one in twice]  # no cache knows them


@pytest.mark.parametrize("cv", [0.5, 1.0, 4.0])
def test_gaps_have_the_mean_and_the_variation(cv):
    options = BenchOptions(rates=(5,), cv=cv, prompt_tokens=(1, 1))
    arrivals = [request.arrival_s for request in planned(options, 3, 20_000, rate=5)]
    gaps = [after - before for before, after in pairwise(arrivals)]
    assert arrivals[0] == 0 and min(gaps) >= 0
    # Within five standard errors; that of the CV, for a gamma with its heavy tail, is about
    # cv (1 + cv²)^½ / n^½.
    assert fmean(gaps) == pytest.approx(1 / 5, rel=5 * cv / 20_000**0.5)
    assert stdev(gaps) * 5 == pytest.approx(cv, rel=5 * (1 + cv**2) ** 0.5 / 20_000**0.5)


def test_classes_are_mixed_by_share_with_lengths_of_their_own():
    few = RequestClass(name="batch", share=0.1, prompt_tokens=(50, 50), output_tokens=(2, 2))
    many = RequestClass(name="interactive", share=0.9)
    options = BenchOptions(rates=(1,), budgets=(few, many), prompt_tokens=(5, 5))
    load = planned(options, 1, rate=1)
    batch = [request for request in load if request.wanted is few]
    # Five standard deviations of a binomial.
    assert len(batch) == pytest.approx(200, abs=5 * (2000 * 0.1 * 0.9) ** 0.5)
    assert {(len(one.prompt), one.num_output_tokens) for one in batch} == {(50, 2)}
    assert {len(one.prompt) for one in load if one.wanted is many} == {5}


def test_text_prompts_have_about_the_length():
    prompt = TextPrompts(0.5).make(100, random.Random(0))
    assert len(prompt.split()) == 50


def test_a_budget_is_read_from_its_text():
    assert parse_class("batch") == RequestClass(name="batch")
    text = "interactive:ttft=1500,tpot=99.5,deadline=9e3,share=0.7,on_miss=degrade,prompt=5:9"
    wanted = parse_class(text)
    assert wanted == RequestClass(
        name="interactive",
        ttft_ms=1500,
        tpot_ms=99.5,
        deadline_ms=9000,
        share=0.7,
        on_miss="degrade",
        prompt_tokens=(5, 9),
    )
    assert wanted.budget == {
        "ttft_ms": 1500,
        "tpot_ms": 99.5,
        "deadline_ms": 9000,
        "priority": "interactive",
        "on_miss": "degrade",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gold:ttft=5", "a class is interactive, standard or batch"),
        ("batch:tttf=5", "'tttf' is not ttft, tpot,"),
        ("batch:ttft=soon", "ttft=soon: it must be a number"),
        ("batch:ttft=0", "it must be above 0"),
        ("batch:ttft", "it must be a number"),
        ("batch:on_miss=cry", "it must be reject or degrade"),
        ("batch:prompt=9:5", "1 <= LOW <= HIGH"),
    ],
)
def test_a_budget_that_cannot_be_read(text, message):
    with pytest.raises(ValueError, match=message):
        parse_class(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rates": (1,), "concurrency": 1}, "--concurrency excludes"),
        ({"trace": "x", "cv": 2.0}, "a --trace brings its own"),
        ({"rates": (1,), "length_scale": 2.0}, "need a --trace"),
        ({"trace": "x", "rates": (1,), "time_scale": 2.0}, "give one of them"),
        ({"warm_up_s": 1.0}, "need arrivals"),
        ({"rates": (1,), "duration_s": 5, "warm_up_s": 3, "cool_down_s": 2}, "leave nothing"),
        ({"rates": (1,), "budgets": (UNLIMITED, UNLIMITED)}, "twice for one class"),
        ({"rates": (1, 2), "find_capacity": True, "budgets": (UNLIMITED,)}, "begins at one"),
        ({"find_capacity": True}, "needs a --budget"),
    ],
)
def test_options_that_do_not_fit_together(options, message):
    with pytest.raises(ValueError, match=message):
        BenchOptions(**options)


def test_a_trace_is_sorted_scaled_and_stretched_to_a_rate(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:50,30,3\n2023-11-16 18:15:46,20,2\n2023-11-16 18:15:56,40,0\n"
    )
    trace = read_trace(path)
    options = BenchOptions(trace=path, length_scale=0.1)
    load = planned(options, 1, rate=2.0, trace=trace)
    assert [one.arrival_s for one in load] == [0.0, pytest.approx(0.4), pytest.approx(1.0)]
    assert [len(one.prompt) for one in load] == [2, 3, 4]
    assert [one.num_output_tokens for one in load] == [1, 1, 1]
    # Of a part, the rate is that part's.
    first = BenchOptions(trace=path, num_requests=1)
    assert planned(first, 1, rate=2.0, trace=trace)[1].arrival_s == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "has no column TIMESTAMP, ContextTokens, GeneratedTokens"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "holds no requests"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nnow,1,2\n", "line 2: .* is not a time"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16\n", "line 2: .* is not a time"),
    ],
)
def test_a_file_that_is_no_trace(tmp_path, text, message):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_trace(path)


class Known:
    """A server with known attainment; counts the rates that are tried."""

    def __init__(self, at_99, at_90):
        self.limits = at_99, at_90
        self.tried = []

    async def measure(self, rate):
        self.tried.append(rate)
        return next((s for s, r in zip(TARGETS, self.limits, strict=True) if rate <= r), 0.5)


@pytest.mark.parametrize(("at_99", "at_90"), [(3.3, 7.7), (0.2, 0.21), (100.0, 100.0)])
def test_capacity_is_found_by_bisection(at_99, at_90):
    server = Known(at_99, at_90)
    found = find_capacities(server.measure, 1.0, 0.1)
    with pytest.raises(StopIteration) as done:
        found.send(None)
    for capacity, limit in zip(done.value.value, (at_99, at_90), strict=True):
        assert capacity.rate <= limit < capacity.above <= capacity.rate * 1.1
    assert len(server.tried) == len(set(server.tried)) <= 16


@pytest.mark.parametrize(
    ("limit", "capacity"),
    [
        (0.0, {"rate": 0.0, "above": 2.0 / 256}),
        (float("inf"), {"rate": 512.0, "above": None}),
    ],
)
def test_the_search_for_a_capacity_ends(limit, capacity):
    with pytest.raises(StopIteration) as done:
        find_capacities(Known(limit, limit).measure, 2.0, 0.1).send(None)
    assert done.value.value == [Capacity(target=target, **capacity) for target in TARGETS]
