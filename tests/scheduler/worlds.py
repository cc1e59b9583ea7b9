"""Machines and crowds drawn from a seed: far more of them a second than drawn value by value."""

from random import Random

from shardline_scheduler import LatencyBudget, OnMiss, Priority

from .machine import Machine, Prices, Visit, machine

_REJECT_MOSTLY = [OnMiss.REJECT] * 3 + [OnMiss.DEGRADE]


def world(seed: int, *, plans_ahead: bool = False) -> tuple[Machine, list[Visit]]:
    """A pipe of one to three uneven stages, and who comes to it: sparse or crowded, with long or
    short prompts and answers. The same crowd comes where steps are planned ahead.
    """
    random = Random(seed)
    num_stages = random.choice([1, 1, 2, 3])
    stages = [_prices(random) for _ in range(num_stages)]
    limits = {
        "max_num_seqs": random.choice([4, 16, 64]),
        "max_num_batched_tokens": random.choice([64, 256, 2048]),
        "num_blocks": random.choice([300, 4000]),
    }
    max_in_flight = random.choice([None, None, num_stages + 1])
    if plans_ahead:
        m = machine(stages, plans_ahead=True, **limits)
    else:
        m = machine(stages, max_in_flight=max_in_flight, **limits)
    return m, _crowd(random)


def _prices(random: Random) -> Prices:
    return (
        random.uniform(1e-3, 20e-3),
        random.uniform(0.05e-3, 1e-3),
        random.uniform(0.05e-3, 2e-3),
        random.uniform(0, 2e-6),
        random.uniform(0, 0.2e-6),
    )


def _crowd(random: Random) -> list[Visit]:
    time, visits = 0.0, []
    gap = random.choice([0.02, 0.1, 0.5])
    longest_prompt, longest_answer = random.choice([300, 1500]), random.choice([8, 120, 120])
    unlimited_share = random.choice([0, 0.3])
    for number in range(random.choice([20, 60, 150])):
        time += random.expovariate(1 / gap)
        is_unlimited = random.random() < unlimited_share
        visits.append(
            Visit(
                number,
                time,
                num_prompt=random.randint(1, longest_prompt),
                num_output=random.randint(1, longest_answer),
                budget=LatencyBudget() if is_unlimited else _budget(random),
                tenant=random.choice("ab"),
            )
        )
    return visits


def _budget(random: Random) -> LatencyBudget:
    limits = {}
    if random.random() < 0.7:
        limits["ttft_ms"] = random.uniform(20, 5000)
    if random.random() < 0.5:
        limits["tpot_ms"] = random.uniform(5, 300)
    if random.random() < 0.4:
        limits["deadline_ms"] = random.uniform(100, 20_000)
    priority, on_miss = random.choice(list(Priority)), random.choice(_REJECT_MOSTLY)
    return LatencyBudget(**limits, priority=priority, on_miss=on_miss)
