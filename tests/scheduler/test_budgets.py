"""Latency budgets on a virtual clock, one readable behaviour at a time."""

from random import Random

import pytest

from shardline_scheduler import (
    LatencyBudget,
)

from .machine import ONE_STAGE, Visit, machine


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
