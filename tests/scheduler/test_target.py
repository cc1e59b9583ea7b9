"""How much of a prompt a step takes while nobody is promised anything, on a virtual clock."""

import pytest

from shardline_scheduler import LatencyBudget

from .machine import ONE_STAGE, Visit, machine

ROOMY = LatencyBudget(ttft_ms=5000, tpot_ms=500)


def of_stages(num_stages: int, **settings: object):
    """A machine as fast as one with a single stage, cut into so many."""
    prices = tuple(price / num_stages for price in ONE_STAGE)
    return machine([prices] * num_stages, **settings)


@pytest.mark.parametrize("num_stages", [2, 4])
def test_a_lone_prompt_keeps_every_stage_busy(num_stages: int):
    alone = Visit(1, 0.0, 2000, 1)
    of_stages(1).run([alone])
    split = Visit(1, 0.0, 2000, 1)
    of_stages(num_stages).run([split])
    assert split.end < 1.8 * alone.end / num_stages, "chunks do not follow each other closely"


@pytest.mark.parametrize("num_stages", [2, 4])
def test_so_it_does_with_a_budget(num_stages: int):
    alone = Visit(1, 0.0, 2000, 1, ROOMY)
    of_stages(1).run([alone])
    split = Visit(1, 0.0, 2000, 1, ROOMY)
    of_stages(num_stages).run([split])
    assert split.met
    assert split.end < 1.8 * alone.end / num_stages, "chunks do not follow each other closely"


def test_one_stage_takes_a_lone_prompt_at_once():
    m = of_stages(1)
    m.run([Visit(1, 0.0, 2000, 1)])
    assert m.scheduler.stats().num_steps == 1


@pytest.mark.parametrize("num_decodes", [1, 2, 5])
@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_a_long_prompt_spreads_the_gaps_between_others_tokens_and_makes_no_hole(
    num_stages: int, num_decodes: int
):
    """Also where all who decode are in other steps than the one that the prompt comes into."""
    decodes = [Visit(i, 0.0, 16, 100) for i in range(num_decodes)]
    of_stages(num_stages).run([*decodes, Visit(99, 0.3, 2000, 1)])
    for visit in decodes:
        gaps = [b - a for a, b in zip(visit.token_times, visit.token_times[1:], strict=False)]
        undisturbed = sorted(gaps)[len(gaps) // 10]
        assert max(gaps[5:]) < 4 * undisturbed


@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_however_many_prompts_wait_gaps_between_others_tokens_stay_even(num_stages: int):
    decodes = [Visit(i, 0.0, 16, 150) for i in range(4)]
    prompts = [Visit(100 + i, 0.3, 2000, 1) for i in range(12)]
    of_stages(num_stages).run([*decodes, *prompts])
    for visit in decodes:
        gaps = [b - a for a, b in zip(visit.token_times, visit.token_times[1:], strict=False)]
        gaps.sort()
        assert gaps[len(gaps) * 99 // 100] <= 2 * gaps[len(gaps) // 2]
        assert gaps[-1] < 8 * gaps[len(gaps) // 20], "a hole"
