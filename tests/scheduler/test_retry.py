"""When to come back, found by asking as little as possible."""

import pytest

from shardline_scheduler.retry import LEAST_WAIT_S, Retries


class Room:
    """There is room from a time on; counts how often that is asked."""

    def __init__(self, time: float) -> None:
        self.time = time
        self.num_asked = 0

    def __call__(self, time: float) -> bool:
        self.num_asked += 1
        return time >= self.time


@pytest.mark.parametrize("after_s", [0.0, 0.05, 0.0501, 1.0, 7.5, 300.0, 599.9, 600.0])
@pytest.mark.parametrize("likely_s", [0.05, 6.0, 550.0])
def test_the_first_wait_that_suffices_is_found_wherever_it_is(after_s: float, likely_s: float):
    now, last_end, retries = 1000.0, 1600.0, Retries()
    assert retries.earliest(now, last_end, Room(now + likely_s)) is not None
    time = retries.earliest(now, last_end, Room(now + after_s))
    assert time is not None
    assert now + max(LEAST_WAIT_S, after_s) <= time <= last_end
    assert time - now <= max(LEAST_WAIT_S, 1.2 * after_s) + 1e-6


def test_where_nothing_helps_there_is_no_time():
    retries = Retries()
    for last_end in (10.0, 10.0, 500.0):
        assert retries.earliest(10.0, last_end, Room(1e9)) is None


def test_those_who_are_refused_together_cost_two_questions_each():
    retries = Retries()
    retries.earliest(0.0, 600.0, Room(20.0))
    for number in range(10):
        room = Room(20.0 + 0.01 * number)
        assert retries.earliest(0.001 * number, 600.0, room) is not None
        assert room.num_asked <= 2
    nowhere = Room(1e9)
    assert retries.earliest(0.0, 600.0, nowhere) is None
    nowhere.num_asked = 0
    assert retries.earliest(0.1, 600.0, nowhere) is None
    assert nowhere.num_asked == 1
