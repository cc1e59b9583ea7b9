"""Planning one step ahead: what a request may be planned for before its token is known."""

import pytest

from shardline_scheduler import FinishReason, LatencyBudget, Scheduler, SchedulerConfig
from shardline_scheduler.plan import LAST_DRAWN, StepPlan

from .machine import Visit, machine
from .parts import parts_of
from .pipe import Pipe
from .reference_worker import solo


def pipe(**settings: object) -> Pipe:
    defaults = {
        "num_blocks": 100,
        "block_size": 4,
        "max_model_len": 200,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "plans_ahead": True,
    }
    return Pipe(Scheduler(SchedulerConfig(**defaults | settings)))  # type: ignore[arg-type]


def parts(plan: StepPlan | None) -> list[tuple[int, int, list[int]]]:
    """Index, first token to compute and what is told of the tokens."""
    assert plan is not None
    return [
        (part.request_index, part.num_computed_tokens, list(part.token_ids))
        for part in parts_of(plan)
    ]


def test_the_next_token_is_planned_while_one_is_drawn():
    p = pipe()
    p.add("a", [1] * 3, max_tokens=5)
    assert parts(p.plan()) == [(0, 0, [])]
    assert parts(p.plan()) == [(0, 3, [LAST_DRAWN])]
    assert p.plan() is None, "two steps are in flight"
    p.commit()
    assert parts(p.plan()) == [(0, 4, [LAST_DRAWN])]
    p.drain()


def test_a_token_that_is_known_is_told():
    p = pipe()
    p.add("a", [1] * 3, max_tokens=5)
    p.plan()
    (output,) = p.commit()
    assert parts(p.plan()) == [(0, 3, list(output.token_ids))]
    p.drain()


def test_nothing_is_planned_beyond_max_tokens():
    p = pipe()
    p.add("a", [1] * 3, max_tokens=2)
    assert [parts(p.plan()) for _ in range(2)] == [[(0, 0, [])], [(0, 3, [LAST_DRAWN])]]
    p.commit()
    assert p.plan() is None
    p.drain()
    p.add("b", [2] * 3, max_tokens=1)
    p.plan()
    assert p.plan() is None


def test_every_step_holds_all_decodes():
    p = pipe()
    for name in "abcde":
        p.add(name, [1], max_tokens=9)
    p.plan()
    for _ in range(3):
        assert len(p.plan().decodes) == 5
        p.commit()
    p.drain()


def test_who_stops_leaves_at_once_and_what_was_planned_ahead_is_dropped():
    prompt, sampling = [1, 2, 3], {"max_tokens": 9, "stop_token_ids": (1,)}
    p = pipe()
    stream = p.add("a", prompt, **sampling)
    num_tokens = len(solo(prompt, stream.sampling))
    assert num_tokens < 8, "it has to stop before it is at its limit"
    p.plan()
    for _ in range(num_tokens):
        p.plan()
        (output,) = p.commit()
    assert output.finish_reason is FinishReason.STOP
    assert p.scheduler.stats().num_used_kv_blocks == 0, "before the step ahead is back"
    assert p.commit() == []
    p.drain()


def test_a_request_with_two_steps_in_flight_can_be_aborted():
    p = pipe()
    p.add("a", [1] * 3, max_tokens=9)
    p.plan()
    p.plan()
    assert p.abort("a")
    p.scheduler.check()
    p.add("b", [1] * 3, max_tokens=3)
    assert (p.commit(), p.commit()) == ([], [])
    p.drain()


def test_a_block_is_shared_as_soon_as_all_of_its_tokens_are_known():
    p = pipe(block_size=4)
    first = p.add("first", [1, 2], max_tokens=6)
    p.plan()
    p.plan()
    p.commit()
    beginning = [1, 2, *solo(first.prompt, first.sampling)][:4]
    assert parts(p.plan()) == [(0, 3, [LAST_DRAWN])], "fills the block by a token in flight"
    p.add("second", [*beginning, 0], max_tokens=1)
    p.commit()
    assert parts(p.plan()) == [(0, 4, [LAST_DRAWN]), (1, 4, [])]
    p.drain()
    assert p.streams["second"].num_cached_tokens == 4


def test_the_younger_steps_back_with_two_tokens_in_flight():
    p = pipe(num_blocks=5, block_size=2, max_num_seqs=2)
    p.add("old", [1] * 3, max_tokens=7)
    p.add("young", [2] * 3, max_tokens=7)
    p.drain()  # Asserts that no token is missing, told twice or another one.
    assert p.scheduler.stats().num_preemptions > 0


def test_who_was_there_when_a_worker_died_is_not_planned_ahead():
    p = pipe()
    p.add("suspect", [1] * 2, max_tokens=5)
    p.plan()
    p.scheduler.strike([0])
    p.lose_everything()
    p.add("other", [2] * 2, max_tokens=5)
    assert parts(p.plan()) == [(1, 0, []), (2, 0, [])]
    assert parts(p.plan()) == [(2, 2, [LAST_DRAWN])]
    p.commit()
    assert [index for index, _, _ in parts(p.plan())] == [1, 2], "a token has cleared it"
    p.drain()


def test_a_first_token_is_promised_behind_the_step_ahead():
    """A step that is planned ahead comes before the newcomer's, and the prediction knows it."""
    m = machine(plans_ahead=True)
    guest = Visit(0, 0.0, num_prompt=10, num_output=50)
    m.run([guest], until=0.1)
    newcomer = Visit(1, m.now, num_prompt=10, num_output=2, budget=LatencyBudget(ttft_ms=500))
    m.run([newcomer])
    predicted = newcomer.last.budget.predicted.ttft_ms
    took = 1e3 * (newcomer.token_times[0] - newcomer.arrival)
    assert predicted == pytest.approx(took, abs=1), "in milliseconds; a step of two decodes: 12"
    assert guest.last.finish_reason is FinishReason.LENGTH


def test_several_stages_have_one_step_more_than_there_are_stages():
    p = pipe(num_stages=2)
    for name in "ab":
        p.add(name, [1] * 3, max_tokens=5)
    assert parts(p.plan()) == [(0, 0, []), (1, 0, [])]
    assert p.plan() is None, "a token of the step before would be waited for in the first stage"
    p.commit()
    assert [len(p.plan().decodes) for _ in range(2)] == [1, 1], "micro-batches are even"
    assert parts(p.plan()) == [(0, 4, [LAST_DRAWN])]
    assert p.plan() is None, "three steps are in flight"
    p.commit()
    assert parts(p.plan()) == [(1, 4, [LAST_DRAWN])]
    p.drain()


def test_a_newcomer_does_not_wait_for_a_token_that_is_being_drawn():
    """A lone decode is not planned again at once: the newcomer would come behind it."""
    p = pipe(num_stages=3)
    p.add("alone", [1] * 3, max_tokens=5)
    p.plan()
    assert p.plan() is None
    p.add("newcomer", [2] * 3, max_tokens=5)
    assert parts(p.plan()) == [(1, 0, [])]
    p.drain()


def test_the_clock_knows_which_step_waits_for_tokens():
    """Two uneven stages: the third step begins when the first one's tokens are drawn."""
    m = machine([(1e-3, 0, 1e-3, 0, 0), (9e-3, 0, 1e-3, 0, 0)], plans_ahead=True)
    m.run([Visit(i, 0.0, num_prompt=1, num_output=50) for i in range(4)], until=0.2)
    assert m.scheduler.num_in_flight == 3
    back_in = m.scheduler._clock.back_in(m.now)
    ends = [running.end - m.now for running in m._in_flight]
    assert back_in == pytest.approx(ends), "seconds"


def test_it_does_not_go_with_a_number_of_steps_in_flight():
    message = "plans_ahead has 3 steps in flight, and max_in_flight is 3"
    with pytest.raises(ValueError, match=message):
        SchedulerConfig(
            num_blocks=8, max_model_len=64, plans_ahead=True, num_stages=2, max_in_flight=3
        )
