"""Who keeps the others waiting while workers are brought together, told without any worker."""

from math import inf

import pytest

from shardline_server.forming_watch import (
    ANSWER_LIMIT_S,
    STILL_LIMIT_S,
    STOPPED_LIMIT_S,
    FormingWatch,
)
from shardline_shards.layout import Place
from shardline_shards.ledger import Entry, Operation

FIRST, SECOND = Place(0, 0), Place(1, 0)


def entry(num_operations: int, operation: Operation = Operation.LOAD) -> Entry:
    return Entry(-1, True, num_operations, operation, (4, 4))


def test_a_survivor_that_does_not_answer_is_held_dead() -> None:
    watch = FormingWatch([FIRST, SECOND], 0.0, steps_s=0.1)
    watch.answered(FIRST)
    assert watch.look({}, [], False, ANSWER_LIMIT_S) is None
    assert watch.look({}, [], False, ANSWER_LIMIT_S + 1) == (
        [SECOND],
        "no answer for 20 s; held dead: stage 1, tp rank 0",
    )


@pytest.mark.parametrize(("steps_s", "limit_s"), [(4.0, 45), (inf, STILL_LIMIT_S)])
def test_a_survivor_in_a_long_step_has_the_time_for_it(steps_s: float, limit_s: float) -> None:
    """As much more than predicted as while nobody is lost; where nobody can tell, long enough."""
    watch = FormingWatch([FIRST], 0.0, steps_s)
    assert watch.look({}, [], False, limit_s) is None
    loss = watch.look({}, [], False, limit_s + 1)
    assert loss == ([FIRST], f"no answer for {limit_s:.0f} s; held dead: stage 0, tp rank 0")


def test_a_stopped_worker_is_held_dead_unless_it_goes_on() -> None:
    watch = FormingWatch([], 0.0, steps_s=0.0)
    assert watch.look({}, [FIRST], False, 0.0) is None
    assert watch.look({}, [], False, 1.0) is None
    assert watch.look({}, [FIRST], False, STOPPED_LIMIT_S + 1) is None
    loss = watch.look({}, [FIRST], False, 2 * STOPPED_LIMIT_S + 2)
    assert loss == ([FIRST], "stopped for 5 s; held dead: stage 0, tp rank 0")


def test_who_loads_may_take_long_as_long_as_it_gets_on() -> None:
    watch = FormingWatch([], 0.0, steps_s=0.0)
    for number in range(5):
        loading = {FIRST: entry(number)}
        assert watch.look(loading, [], False, number * 0.9 * STILL_LIMIT_S) is None
    loss = watch.look(loading | {SECOND: None}, [], False, 5 * STILL_LIMIT_S)
    assert loss == ([FIRST], "no progress for 120 s; held dead: stage 0, tp rank 0")


def test_in_the_first_step_who_receives_is_not_to_blame() -> None:
    watch = FormingWatch([], 0.0, steps_s=0.0)
    trying = {FIRST: entry(3, Operation.ALL_REDUCE), SECOND: entry(2, Operation.RECEIVE)}
    assert watch.look(trying, [], True, 0.0) is None
    loss = watch.look(trying, [], True, STILL_LIMIT_S + 1)
    assert loss is not None
    assert loss[0] == [FIRST]
    trying[SECOND] = entry(3, Operation.COMPUTE)
    assert watch.look(trying, [], True, STILL_LIMIT_S + 2) is None
