"""What less urgent classes leave to more urgent ones, by what those lately asked for."""

import pytest

from shardline_scheduler.asked import MEMORY_S, Reserve
from shardline_scheduler.budget import Priority
from shardline_scheduler.urgency import Urgency


def asked_steadily(priority: Priority, seconds: int) -> Urgency:
    """Every second, a tenth of a second of prompts and two seconds in a seat; one of the batch
    class is promised something.
    """
    urgency = Urgency()
    urgency.begin_promise(Priority.BATCH)
    for second in range(seconds + 1):
        urgency.ask(priority, float(second), prefill_s=0.1, stay_s=2.0)
    return urgency


@pytest.mark.parametrize("seconds", [10, 300])
def test_what_is_kept_is_what_is_asked_for(seconds: int):
    """Seats for two on average, and as many more as their number varies by."""
    reserve = asked_steadily(Priority.INTERACTIVE, seconds).reserve(Priority.BATCH, float(seconds))
    assert reserve.prefill_share == pytest.approx(0.1, rel=0.15)
    assert reserve.num_requests == 5


def test_it_fades():
    urgency = asked_steadily(Priority.INTERACTIVE, 300)
    later = urgency.reserve_later(Priority.BATCH, 300 + MEMORY_S)
    assert later.prefill_share == pytest.approx(0.1 * 0.37, rel=0.05)


def test_the_promised_are_not_counted_twice_but_may_be_over_later():
    urgency = asked_steadily(Priority.INTERACTIVE, 300)
    for _ in range(5):
        urgency.begin_promise(Priority.INTERACTIVE)
    assert urgency.reserve(Priority.BATCH, 300.0).num_requests == 0
    assert urgency.reserve_later(Priority.BATCH, 300.0).num_requests == 5


def test_the_first_of_a_class_may_have_all():
    assert asked_steadily(Priority.INTERACTIVE, 9).reserve(Priority.STANDARD, 9.0) == Reserve()


def test_nobody_leaves_anything_to_his_own_class_or_a_less_urgent_one():
    urgency = asked_steadily(Priority.STANDARD, 9)
    urgency.begin_promise(Priority.STANDARD)
    urgency.begin_promise(Priority.INTERACTIVE)
    assert urgency.reserve(Priority.STANDARD, 9.0) == Reserve()
    assert urgency.reserve(Priority.INTERACTIVE, 9.0) == Reserve()
    assert urgency.reserve(Priority.BATCH, 9.0) != Reserve()
