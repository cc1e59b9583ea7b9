"""Who is stuck and who diverged, told from ledgers alone; and one real rank that diverges."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.engine_process import engine_config
from tests.tiny import save_tiny

from shardline_scheduler.plan import Chunk, NewRequest, SamplingParams, StepPlan
from shardline_server.step_watch import (
    HANG_FACTOR,
    HANG_FLOOR_S,
    StepWatch,
    find_divergence,
    find_stuck,
)
from shardline_server.worker_group import WorkerGroup, WorkerLost
from shardline_shards.gate import Gate
from shardline_shards.layout import ParallelLayout, Place
from shardline_shards.ledger import Ledger, Operation

PLACES = [Place(0, 0), Place(0, 1), Place(1, 0), Place(1, 1)]


@contextmanager
def ledgers() -> Iterator[dict[Place, Ledger]]:
    made = {place: Ledger.create() for place in PLACES}
    yield made
    for ledger in made.values():
        ledger.close()


def do_step(ledger: Ledger, step_id: int, *, plan: int = 7, width: int = 36) -> None:
    ledger.begin(step_id, plan, 5)
    ledger.note(Operation.ALL_REDUCE, (1, 5, width))
    ledger.finish()


def stuck(made: dict[Place, Ledger], step_id: int) -> list[Place]:
    return find_stuck({place: ledger.read() for place, ledger in made.items()}, step_id)


def test_a_page_is_read_by_who_maps_it_and_outlives_its_writer() -> None:
    mine = Ledger.create()
    assert mine.read() is None
    theirs = Ledger(os.dup(mine.descriptor))
    theirs.begin(3, 7, 5)
    theirs.note(Operation.ALL_REDUCE, (1, 5, 36))
    theirs.close()
    assert str(mine.read()) == "at step 3, operation 2: all_reduce [5, 36]"
    mine.close()


def test_who_computes_holds_up_who_waits() -> None:
    with ledgers() as made:
        for place, ledger in made.items():
            do_step(ledger, 1)
            ledger.begin(2, 7, 5)
            ledger.note(Operation.RECEIVE if place.stage_index else Operation.ALL_REDUCE, (5, 36))
        made[Place(0, 1)].begin(2, 7, 5)
        assert stuck(made, 2) == [Place(0, 1)]
        made[Place(0, 1)].note(Operation.ALL_REDUCE, (5, 36))
        made[Place(0, 0)].note(Operation.ALL_REDUCE, (5, 36))
        assert stuck(made, 2) == [Place(0, 1)], "it is behind the other"
        for rank in (0, 1):
            made[Place(0, rank)].finish()
        assert stuck(made, 2) == [Place(1, 0), Place(1, 1)], "nobody is left to wait for"


def test_a_result_is_overdue_by_what_its_steps_should_take() -> None:
    watch = StepWatch()
    assert watch.overdue(0.0, now=1e6) is None
    watch.submit(StepPlan(4), now=100.0)
    limit = HANG_FLOOR_S + HANG_FACTOR * 2.0
    assert watch.overdue(2.0, now=100.0 + limit) is None
    assert watch.overdue(2.0, now=100.1 + limit) == 4
    assert watch.overdue(float("inf"), now=1e6) is None, "no step has shown yet what it takes"
    watch.arrive(4, now=200.0)
    assert watch.overdue(0.0, now=1e6) is None


def test_who_does_something_else_is_named() -> None:
    with ledgers() as made:
        for ledger in made.values():
            do_step(ledger, 1)
        assert not find_divergence(made, 1)
        for place, ledger in made.items():
            do_step(ledger, 2, plan=8 if place == Place(1, 0) else 7)
        assert find_divergence(made, 2) == {Place(1, 0): "was given another plan of step 2"}
        for place, ledger in made.items():
            do_step(ledger, 3, width=37 if place == Place(1, 0) else 36)
        other = "did other operations in step 3 than its stage"
        assert find_divergence(made, 3) == {Place(1, 0): other, Place(1, 1): other}


def test_a_rank_that_diverges_is_named_by_the_next_result(tmp_path: Path) -> None:
    layout = ParallelLayout(tp=1, stage_layers=(1, 1, 1))
    config = engine_config(save_tiny("llama", tmp_path), layout)
    gate = Gate(config.keys)
    group = WorkerGroup(config, gate)
    group.start()
    try:
        for step_id in (0, 1):
            group.submit(plan_of(step_id, token_id=5))
        group._send(1, plan_of(2, token_id=6))
        for rank in (0, 2):
            group._send(rank, plan_of(2, token_id=5))
        group.submit(plan_of(3, token_id=5))
        reason = "stage 1, tp rank 0 was given another plan of step 2"
        with pytest.raises(WorkerLost, match=reason):
            while group.poll(30_000):
                list(group.results())
    finally:
        group.kill()
        gate.close()


@pytest.mark.parametrize("num_tokens", [1, 2])
def test_shards_that_sum_inside_the_kernel_and_diverge_are_named(
    tmp_path: Path, num_tokens: int
) -> None:
    """Of two there is no majority. The kernel's sums are one operation, of the step's shape."""
    layout = ParallelLayout(tp=2, stage_layers=(3,))
    config = engine_config(save_tiny("llama", tmp_path), layout)
    gate = Gate(config.keys)
    group = WorkerGroup(config, gate)
    group.start()
    try:
        for step_id in (0, 1):
            group.submit(plan_of(step_id, token_id=5))
        group._send(0, plan_of(2, token_id=5))
        group._send(1, plan_of(2, token_id=6, num_tokens=num_tokens))
        group.submit(plan_of(3, token_id=5))
        with pytest.raises(WorkerLost, match="another plan of step 2") as lost:
            while group.poll(30_000):
                list(group.results())
        assert lost.value.places == (Place(0, 0), Place(0, 1))
    finally:
        group.kill()
        gate.close()


def plan_of(step_id: int, token_id: int, num_tokens: int = 1) -> StepPlan:
    """A prompt that the next plan forgets."""
    sampling = SamplingParams(max_tokens=1, seed=0)
    new = NewRequest(step_id, [token_id] * num_tokens, num_tokens, sampling)
    chunk = Chunk(step_id, 0, num_tokens, [step_id], True)
    return StepPlan(step_id, [step_id - 1] if step_id else [], [new], chunks=[chunk])
