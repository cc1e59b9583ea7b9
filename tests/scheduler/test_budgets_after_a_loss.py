"""What a lost worker means for budgets, on a virtual clock: all has to be computed again."""

import pytest

from shardline_scheduler import BudgetUnmet, LatencyBudget

from .machine import Visit, machine

PROMPT = 2000  # computed in a second


@pytest.mark.parametrize("deadline_ms", [2400, 4000])
def test_who_cannot_make_it_any_more_is_told_at_once_and_the_others_go_on(deadline_ms: int) -> None:
    """One has said something, and may have no time to compute its prompt again."""
    m = machine()
    hard = Visit(0, 0.0, PROMPT, 30, LatencyBudget(deadline_ms=deadline_ms))
    guest = Visit(1, 0.0, 100, 30)
    m.run([hard, guest], until=1.4)
    assert hard.token_times and hard.last is None
    lost_at = m.now
    m.lose_everything()
    assert hard.is_hopeless == (deadline_ms == 2400)
    m.run([])
    assert hard.end == lost_at if hard.is_hopeless else hard.met
    assert len(guest.token_times) == 30


@pytest.mark.parametrize("is_lost", [False, True])
def test_what_is_computed_again_counts_at_admission(is_lost: bool) -> None:
    """Nobody who comes then is promised what only an undisturbed server can keep."""
    m = machine()
    promised = Visit(0, 0.0, PROMPT, 100, LatencyBudget(ttft_ms=1500, tpot_ms=50))
    m.run([promised], until=1.5)
    assert promised.token_times
    if is_lost:
        m.lose_everything()
    newcomer = Visit(1, m.now, 256, 10, LatencyBudget(ttft_ms=600))
    m.run([newcomer])
    assert isinstance(newcomer.refusal, BudgetUnmet) == is_lost
    assert newcomer.refusal is not None or newcomer.met
