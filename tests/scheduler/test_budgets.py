"""Latency budgets on a virtual clock, one readable behaviour at a time."""

from math import exp
from random import Random

import pytest
from msgspec.structs import replace

from shardline_scheduler import (
    BudgetImpossible,
    BudgetUnmet,
    FinishReason,
    LatencyBudget,
    OnMiss,
    Priority,
)

from .machine import ONE_STAGE, Machine, Prices, Visit, exact_model, machine


def visits_at_rate(
    rate: float, seconds: float, random: Random, budget: LatencyBudget, **kwargs: object
) -> list[Visit]:
    """Poisson arrivals of prompts of 128 to 384 tokens with 32 to 96 tokens to come."""
    visits: list[Visit] = []
    time = random.expovariate(rate)
    while time < seconds:
        number = kwargs.get("first", 0) + len(visits)  # type: ignore[operator]
        visit = Visit(number, time, random.randint(128, 384), random.randint(32, 96), budget)
        visit.tenant = str(kwargs.get("tenant", ""))
        visits.append(visit)
        time += random.expovariate(rate)
    return visits


def share_met(visits: list[Visit]) -> float:
    return sum(visit.refusal is None and visit.met for visit in visits) / len(visits)


TIGHT = LatencyBudget(ttft_ms=1500, tpot_ms=100)


@pytest.mark.parametrize("num_stages", [1, 2, 4])
@pytest.mark.parametrize("rate", [2.0, 10.0])
def test_everyone_who_is_admitted_is_in_time(num_stages: int, rate: float):
    stage = tuple(price / num_stages for price in ONE_STAGE)
    m = machine([stage] * num_stages)
    visits = visits_at_rate(rate, 60, Random(1), TIGHT)
    m.run(visits)
    admitted = [visit for visit in visits if visit.refusal is None]
    assert all(visit.met for visit in admitted)
    assert len(admitted) / len(visits) > (0.99 if rate == 2 else 0.3)
    print(len(admitted) / 60, len(visits) / 60)


def test_first_come_first_served_is_late_for_nearly_all_where_edf_serves_its_capacity():
    random = Random(1)
    fcfs = machine(policy="fcfs")
    visits = visits_at_rate(10, 60, random, TIGHT)
    fcfs.run(visits)
    assert share_met(visits) < 0.1
    edf = machine()
    visits = visits_at_rate(10, 60, Random(1), TIGHT)
    edf.run(visits)
    assert share_met(visits) > 0.4


def test_what_an_empty_server_cannot_keep_is_impossible():
    m = machine()
    visits = [
        Visit(0, 1.0, 1000, 10, LatencyBudget(ttft_ms=300)),  # 510 ms of prefill
        Visit(1, 2.0, 10, 10, LatencyBudget(tpot_ms=9)),
        Visit(2, 3.0, 10, 100, LatencyBudget(deadline_ms=1000)),
        Visit(3, 4.0, 10, 50, LatencyBudget(deadline_ms=1000), max_tokens=100),
        Visit(4, 6.0, 1000, 10, LatencyBudget(ttft_ms=800, tpot_ms=15)),
    ]
    m.run(visits)
    kinds = [type(visit.refusal) for visit in visits]
    # With nothing known of lengths, up to 100 tokens are planned with: 11 ms each are too many.
    assert kinds == [BudgetImpossible] * 4 + [type(None)]
    assert visits[0].refusal.predicted.ttft_ms > 500
    assert "ttft_ms 300 asked" in str(visits[0].refusal)


def test_an_empty_server_keeps_what_it_can_just_keep():
    m = machine()
    visit = Visit(0, 0.0, 1000, 40, LatencyBudget(ttft_ms=640, tpot_ms=13))
    m.run([visit])
    assert visit.met


@pytest.mark.parametrize("num_stages", [1, 3])
@pytest.mark.parametrize("max_num_batched_tokens", [64, 2048])
def test_prompts_that_cost_nothing_by_the_fit_are_still_counted(
    num_stages: int, max_num_batched_tokens: int
):
    """Of a tiny model only the fixed time of a step may be left: nothing is impossible by it but
    what is below that time.
    """
    free = (5e-3, 0.0, 0.0, 0.0, 0.0)
    m = machine(
        [free] * num_stages,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=32,
    )
    tight = LatencyBudget(ttft_ms=0.001)
    fair = [Visit(i, 0.01 * i, 40, 10, LatencyBudget(ttft_ms=200, tpot_ms=50)) for i in range(8)]
    never = [Visit(100, 0.005, 40, 10, tight), Visit(101, 10.0, 1, 1, tight)]
    m.run([*fair, *never])
    assert [type(visit.refusal) for visit in never] == [BudgetImpossible] * 2
    assert all(visit.refusal is None and visit.met for visit in fair)


@pytest.mark.parametrize("max_num_batched_tokens", [64, 256, 2048])
@pytest.mark.parametrize(
    ("small", "large"),
    [
        ((20e-3, 1e-5, 1e-5, 0.0, 0.0), (1e-3, 2e-5, 1e-5, 0.0, 0.0)),
        ((1e-3, 1e-5, 1e-5, 0.0, 5e-4), (5e-3, 1e-6, 1e-5, 0.0, 0.0)),
        ((1e-3, 1e-3, 1e-5, 0.0, 0.0), (2e-3, 1e-6, 1e-5, 0.0, 5e-5)),
    ],
)
def test_ranges_that_contradict_each_other_make_nothing_impossible(
    small: Prices, large: Prices, max_num_batched_tokens: int
):
    """Fitted to few steps of a busy machine, more tokens may seem to take less time."""
    model, other = exact_model((small, small)), exact_model((large, large))
    for stage, its_other in zip(model.stages, other.stages, strict=True):
        stage.compute_bound = its_other.compute_bound
    m = machine((small, small), model=model, max_num_batched_tokens=max_num_batched_tokens)
    hour = 3.6e6
    lax = LatencyBudget(ttft_ms=hour, tpot_ms=hour / 10, deadline_ms=hour)
    visits = [Visit(i, 40.0 * i, num, 200, lax) for i, num in enumerate((1, 50, 63, 65, 400, 1500))]
    m.run(visits)
    assert all(visit.refusal is None and visit.met for visit in visits)


def test_one_who_is_refused_passes_when_he_comes_back_as_told():
    """With jitter zero, and nobody else coming: the promise in Retry-After is kept."""
    m = machine()
    crowd = [Visit(i, 0.0, 256, 64, TIGHT) for i in range(60)]
    m.run(crowd, until=0.01)
    refused = [visit for visit in crowd if visit.refusal is not None]
    assert refused and len(refused) < 60
    (first, *_) = refused
    assert isinstance(first.refusal, BudgetUnmet)
    again = Visit(100, m.now + first.refusal.retry_after_s, 256, 64, TIGHT)
    m.run([again])
    assert again.refusal is None and again.met
    assert all(visit.met for visit in crowd if visit.refusal is None)


def test_a_refusal_knows_who_came_and_went_at_the_same_moment():
    """Two seats: whoever is refused waits for the shorter one of those who have them."""
    scheduler = machine(max_num_seqs=2).scheduler

    def waits_s(number: int) -> float:
        with pytest.raises(BudgetUnmet) as refused:
            scheduler.add(Visit(number, 0.0, 256, 64, TIGHT).request(), 0.0)
        return refused.value.retry_after_s

    for number, num_output in enumerate((50, 400)):
        scheduler.add(Visit(number, 0.0, 256, num_output, TIGHT).request(), 0.0)
    while_one_is_short = waits_s(2)
    assert waits_s(3) == while_one_is_short
    scheduler.abort("0")
    scheduler.add(Visit(4, 0.0, 256, 400, TIGHT).request(), 0.0)
    assert waits_s(5) > 4 * while_one_is_short


def test_a_hard_deadline_ends_a_request_as_soon_as_it_is_lost():
    """Its output is longer than planned: steps are twice as long as the model believes."""
    slow = tuple(2 * price for price in ONE_STAGE)
    m = Machine(machine().scheduler, [slow])
    visit = Visit(0, 0.0, 100, 100, LatencyBudget(deadline_ms=1500))
    m.run([visit])
    assert visit.is_hopeless and visit.last.finish_reason is FinishReason.DEADLINE
    assert not visit.met and visit.end < 1.5
    assert 0 < len(visit.token_times) < 100
    assert visit.last.index == len(visit.token_times)


def test_a_soft_budget_is_never_a_reason_to_end():
    slow = tuple(2 * price for price in ONE_STAGE)
    m = Machine(machine().scheduler, [slow])
    soft = LatencyBudget(deadline_ms=1500, on_miss=OnMiss.DEGRADE)
    visits = [Visit(i, 0.0, 100, 100, soft) for i in range(3)]
    m.run(visits)
    assert all(len(visit.token_times) == 100 and not visit.met for visit in visits)
    (soft_stats,) = [c for c in m.scheduler.stats().classes if c.priority is Priority.STANDARD]
    assert (soft_stats.num_met, soft_stats.num_missed, soft_stats.num_refused) == (0, 3, 0)


def test_who_would_rather_be_late_is_taken_in_and_holds_up_nobody():
    m = machine()
    soft = LatencyBudget(ttft_ms=1500, tpot_ms=100, on_miss=OnMiss.DEGRADE)
    hard = visits_at_rate(3, 60, Random(2), TIGHT)
    late = visits_at_rate(10, 60, Random(3), soft, first=1000)
    m.run([*hard, *late])
    assert all(visit.refusal is None for visit in late)
    assert all(visit.met for visit in hard if visit.refusal is None)
    assert not all(visit.met for visit in late)


@pytest.mark.parametrize("num_stages", [1, 2])
def test_requests_without_limits_are_never_refused_and_make_nobody_late(num_stages: int):
    stage = tuple(price / num_stages for price in ONE_STAGE)
    m = machine([stage] * num_stages, num_blocks=600)
    guests = visits_at_rate(10, 30, Random(4), LatencyBudget(), first=1000)
    hard = visits_at_rate(3, 30, Random(5), TIGHT)
    m.run([*guests, *hard])
    assert all(visit.refusal is None for visit in guests)
    assert all(len(visit.token_times) == visit.num_output for visit in guests)
    admitted = [visit for visit in hard if visit.refusal is None]
    assert len(admitted) > 0.7 * len(hard)
    assert all(visit.met for visit in admitted)


def test_a_backlog_without_limits_fills_the_seats():
    """Steps that only a few decodes measured would bring prompts to their end as slowly as those
    few end, so that it stays at few: at 12, of 32 seats.
    """
    prices: Prices = (10e-3, 1e-3, 1e-3, 1e-6, 0.1e-6)
    m = machine((prices,), model=exact_model((prices,)), max_num_seqs=32)
    visits = [Visit(i, 0.0, 256, 64) for i in range(200)]
    m.run(visits)
    middle = m.now / 2
    assert sum(visit.token_times[0] <= middle < visit.end for visit in visits) > 20


def test_guests_go_by_class_and_then_by_their_tenants_turns():
    m = machine(max_num_seqs=1)
    batch = LatencyBudget(priority=Priority.BATCH)
    interactive = LatencyBudget(priority=Priority.INTERACTIVE)
    visits = [
        Visit(0, 0.0, 10, 2, tenant="busy"),
        *(Visit(i, 0.001, 10, 2, tenant="busy") for i in (1, 2, 3)),
        Visit(4, 0.002, 10, 2, batch),
        Visit(5, 0.003, 10, 2, tenant="new"),
        Visit(6, 0.004, 10, 2, interactive),
    ]
    m.run(visits)
    order = sorted(visits, key=lambda visit: visit.end)
    assert [visit.number for visit in order] == [0, 6, 5, 1, 2, 3, 4]


def test_a_shorter_prompt_passes_a_longer_one_that_is_due_at_the_same_time():
    m = machine(max_num_batched_tokens=256)
    lax = LatencyBudget(ttft_ms=10_000)
    visits = [Visit(0, 0.0, 2000, 1, lax), Visit(1, 0.1, 2000, 1, lax), Visit(2, 0.2, 50, 1, lax)]
    m.run(visits)
    assert [v.number for v in sorted(visits, key=lambda visit: visit.end)] == [2, 0, 1]


def test_memory_at_its_peak_is_a_reason_to_refuse():
    m = machine(num_blocks=40)  # 640 tokens
    lax = LatencyBudget(deadline_ms=60_000)
    visits = [Visit(i, 0.1 * i, 100, 200, lax) for i in range(4)]
    m.run(visits)
    kinds = [type(visit.refusal) for visit in visits]
    assert kinds == [type(None), type(None), BudgetUnmet, BudgetUnmet]
    assert "KV memory is short, not time: 20 blocks" in str(visits[2].refusal)
    assert "the 40 there are" in str(visits[2].refusal)
    assert all(visit.met for visit in visits if visit.refusal is None)
    assert m.scheduler.stats().num_preemptions == 0


@pytest.mark.parametrize(
    ("limits", "settings", "reason"),
    [
        ({"ttft_ms": 1000}, {}, "too much is promised before it"),
        ({"tpot_ms": 16}, {}, "tokens would come too slowly"),
        ({"ttft_ms": 60_000}, {"max_num_seqs": 2}, "at most 2 requests run at once"),
    ],
)
def test_a_refusal_says_what_is_short(
    limits: dict[str, float], settings: dict[str, int], reason: str
):
    m = machine(**settings)
    visits = [Visit(i, 0.001 * i, 400, 50, LatencyBudget(**limits)) for i in range(12)]
    m.run(visits)
    refused = [visit for visit in visits if visit.refusal is not None]
    assert refused and all(reason in str(visit.refusal) for visit in refused)
    assert all(visit.met for visit in visits if visit.refusal is None)


@pytest.mark.parametrize("settings", [{}, {"max_num_seqs": 16}, {"num_blocks": 300}])
@pytest.mark.parametrize("num_stages", [1, 2])
def test_requests_without_limits_get_on_while_others_are_promised_all_there_is(
    num_stages: int, settings: dict[str, int]
):
    """For a minute three times what can be served is asked for, with limits."""
    stage = tuple(price / num_stages for price in ONE_STAGE)
    m = machine([stage] * num_stages, **settings)
    hard = visits_at_rate(20, 60, Random(2), TIGHT)
    guests = visits_at_rate(0.3, 60, Random(3), LatencyBudget(), first=5000)
    m.run([*hard, *guests])
    waits = [guest.token_times[0] - guest.arrival for guest in guests]
    assert max(waits) < 10 and max(guest.end - guest.arrival for guest in guests) < 30
    admitted = [visit for visit in hard if visit.refusal is None]
    assert len(admitted) > 200 and all(visit.met for visit in admitted)


@pytest.mark.parametrize("num_output", [2, 3, 7])
def test_short_answers_keep_their_promises_though_steps_vary(num_output: int):
    """The mean of few tokens varies more than that of many."""
    m, tight = uneven(0.1), LatencyBudget(ttft_ms=1500, tpot_ms=60)
    gaps, time, visits = Random(3), 0.0, []
    for i in range(800):
        time += gaps.expovariate(1 / 0.15)
        visits.append(Visit(i, time, 256, num_output, tight))
    m.run(visits)
    admitted = [visit for visit in visits if visit.refusal is None]
    assert len(admitted) > 400
    assert sum(visit.met for visit in admitted) >= 0.998 * len(admitted)


def test_what_is_uneven_averages_out_over_a_long_queue():
    """Of 60 prompts that come together, so many are admitted that the last ones use up their time;
    with the whole margin for every one of their steps it would be 24.
    """
    limit = LatencyBudget(ttft_ms=4000, tpot_ms=200)
    m = uneven(0.15, (1e-3, 0.5e-3, 0.0, 0.0, 0.0))
    visits = [Visit(i, 10.0 * (i // 60), 256, 2, limit) for i in range(1200)]
    m.run(visits)
    admitted = [visit for visit in visits if visit.refusal is None]
    assert len(admitted) >= 26 * 20
    assert sum(visit.met for visit in admitted) >= 0.99 * len(admitted)


def uneven(spread: float, prices: Prices = ONE_STAGE) -> Machine:
    """Steps take what was expected but for log-normal noise, whose 0.9 quantile planning adds."""
    random, model = Random(1), exact_model((prices,))
    (stage,) = model.stages
    for part in (stage.memory_bound, stage.compute_bound):
        part.widen(exp(1.28 * spread) - 1)
    return Machine(
        machine(model=model).scheduler,
        (prices,),
        noise=lambda: random.lognormvariate(-(spread**2) / 2, spread),
    )


@pytest.mark.parametrize("num_stages", [2, 4])
def test_a_second_token_may_come_a_whole_round_but_one_step_late(num_stages: int):
    """So much is taken off the limit of a short answer, and no less would do: prompts that end in
    one step have their next tokens dealt over all steps of a round.
    """
    stage = tuple(price / num_stages for price in ONE_STAGE)
    lax = LatencyBudget(tpot_ms=60_000)
    m = machine([(*stage[:2], 0.0, 0.0, 0.0)] * num_stages)
    visits = [Visit(i, 0.0, 4, 2, lax) for i in range(2 * num_stages)]
    m.run(visits)
    gaps = [visit.token_times[1] - visit.token_times[0] for visit in visits]
    assert min(gaps) == pytest.approx(num_stages * stage[0])
    assert max(gaps) == pytest.approx((2 * num_stages - 1) * stage[0])


def test_cached_prompt_tokens_count_for_nothing():
    m = machine()
    prompt = list(range(1000))
    limit = LatencyBudget(ttft_ms=300)
    cold = Visit(0, 0.0, 1000, 1, limit, prompt=prompt)
    fill = Visit(1, 1.0, 1000, 1, prompt=prompt)
    warm = Visit(2, 3.0, 1000, 1, limit, prompt=prompt)
    m.run([cold, fill, warm])
    assert isinstance(cold.refusal, BudgetImpossible)
    assert warm.refusal is None and warm.met


def test_planned_lengths_follow_what_a_class_says():
    """Half of what max_tokens allows is never said: once known, more fit in."""
    tight = LatencyBudget(deadline_ms=3000, tpot_ms=60)
    m = machine()
    before = [Visit(i, 0.0, 20, 20, tight, max_tokens=400) for i in range(2)]
    m.run(before)
    assert all(isinstance(visit.refusal, BudgetImpossible) for visit in before)
    teach = [Visit(100 + i, 10.0 + i, 20, 20, max_tokens=400) for i in range(30)]
    after = Visit(200, 60.0, 20, 20, tight, max_tokens=400)
    m.run([*teach, after])
    assert after.refusal is None and after.met


def test_a_tenant_at_ten_times_its_share_costs_another_nothing():
    def attainment(greedy_rate: float) -> float:
        m = machine()
        modest = visits_at_rate(1.0, 300, Random(6), TIGHT, tenant="modest")
        greedy: list[Visit] = []
        if greedy_rate:
            greedy = visits_at_rate(
                greedy_rate, 300, Random(7), TIGHT, tenant="greedy", first=100_000
            )
        m.run([*modest, *greedy])
        assert all(visit.met for visit in greedy if visit.refusal is None)
        warm = [visit for visit in modest if visit.arrival > 30]
        return share_met(warm)

    assert attainment(20.0) >= attainment(0.0) - 0.02


def test_who_is_promised_a_first_token_fills_steps_to_the_last_one():
    """35 steps of 42.75 ms are over in 1.5 s, and each has time for 65 tokens of prompts."""
    m = machine([(10e-3, 0.5e-3, 0.0, 0.0, 0.0)])
    limits = LatencyBudget(ttft_ms=1500, tpot_ms=45)
    visits = [Visit(number, 0.0, 200, 16, limits) for number in range(20)]
    m.run(visits)
    admitted = [visit for visit in visits if visit.refusal is None]
    assert len(admitted) >= 10
    assert all(visit.met for visit in admitted)


@pytest.mark.parametrize("num_stages", [1, 2])
def test_batch_work_gets_what_interactive_requests_leave(num_stages: int):
    """Half of what can be served is asked for by interactive requests, all of it by batch ones."""
    stage = tuple(price / num_stages for price in ONE_STAGE)
    m = machine([stage] * num_stages)
    hurried = replace(TIGHT, priority=Priority.INTERACTIVE)
    patient = LatencyBudget(deadline_ms=30_000, priority=Priority.BATCH)
    interactive = visits_at_rate(1.5 * num_stages, 120, Random(8), hurried)
    batch = visits_at_rate(4 * num_stages, 120, Random(9), patient, first=5000)
    m.run([*interactive, *batch])
    assert share_met(interactive) >= 0.99
    admitted = [visit for visit in batch if visit.refusal is None]
    assert all(visit.met for visit in admitted)
    assert len(admitted) > len(batch) / 4
    reasons = [str(visit.refusal) for visit in batch if visit.refusal is not None]
    assert any("kept for more urgent classes" in reason for reason in reasons)


def test_a_lax_limit_keeps_no_more_room_than_its_request_can_use():
    """No step takes an hour, however long a token may take."""
    m = machine()
    lax = LatencyBudget(tpot_ms=3_600_000, priority=Priority.INTERACTIVE)
    patient = LatencyBudget(deadline_ms=30_000, priority=Priority.BATCH)
    batch = [Visit(1 + i, 3.0 + 0.1 * i, 100, 60, patient) for i in range(10)]
    m.run([Visit(0, 0.0, 100, 20, lax), *batch])
    assert all(visit.refusal is None and visit.met for visit in batch)
