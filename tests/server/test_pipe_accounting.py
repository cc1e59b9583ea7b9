"""Where the pipe's time goes: a virtual pipe of known times, and a real one of two stages."""

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.engine_process import EngineConnection, running_engine
from tests.server.test_engine import make_requests
from tests.tiny import save_tiny

from shardline_scheduler.plan import StageTiming
from shardline_server.engine_timeline import TimePart
from shardline_server.messages import PipeStats
from shardline_server.pipe_accounting import PipeAccounting
from shardline_shards.layout import ParallelLayout

START = 100.0


@dataclass
class VirtualPipe:
    """Stages of known speed behind an engine that needs `think_s` for each plan."""

    num_stages: int
    clock_offsets: Sequence[float]
    hop_s: float = 0.0
    think_s: float = 0.0
    now: float = START
    free_at: list[float] = field(init=False)
    late_reports: deque[StageTiming] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.accounting = PipeAccounting(self.num_stages, self.now)
        self.free_at = [START] * self.num_stages

    def run(self, steps: Sequence[float], max_in_flight: int, *, has_more: bool = True) -> None:
        """Steps that take that long of every stage, each planned as soon as there is room."""
        in_flight: deque[tuple[float, StageTiming]] = deque()
        for step_id, stage_s in enumerate(steps):
            if len(in_flight) == max_in_flight:
                self._take_result(*in_flight.popleft())
            self.now += self.think_s
            self.accounting.submitted(step_id, self.now)
            self.accounting.settled(True, self.now)
            in_flight.append(self._travel(step_id, stage_s))
        for result in in_flight:
            self._take_result(*result)
            self.accounting.settled(has_more, self.now)
        while self.late_reports:
            self.accounting.observe(self.late_reports.popleft())

    def _take_result(self, ended_at: float, timing: StageTiming) -> None:
        self.now = max(self.now, ended_at + self.hop_s)
        self.accounting.woke(self.now)
        self.accounting.heard(timing.stage_index, timing.ended_at, self.now)
        self.accounting.observe(timing)

    def _travel(self, step_id: int, stage_s: float) -> tuple[float, StageTiming]:
        sent_at = self.now
        for stage, free_at in enumerate(self.free_at):
            planned_at = max(free_at, self.now + self.hop_s)
            received_at = max(planned_at, sent_at + self.hop_s) if stage else planned_at
            parts = (planned_at - free_at, 0.0, received_at - planned_at, stage_s, 0.0)
            started_at = free_at + self.clock_offsets[stage]
            timing = StageTiming(stage, step_id, started_at, *parts)
            sent_at = self.free_at[stage] = received_at + stage_s
            if stage < self.num_stages - 1:
                self.accounting.heard(stage, timing.ended_at, sent_at + self.hop_s)
                self.late_reports.append(timing)
        return sent_at, timing


def seconds(stats: PipeStats, stage: int) -> dict[str, float]:
    return {part: value for part, value in stats.stages[stage].seconds.items() if value > 1e-9}


def test_one_micro_batch_leaves_the_other_stage_starved() -> None:
    pipe = VirtualPipe(2, [0.0, 0.0])
    pipe.run([1.0] * 10, max_in_flight=1, has_more=False)
    stats = pipe.accounting.stats(pipe.now + 5.0)
    assert stats.wall_s == pytest.approx(25.0)
    for stage in range(2):
        assert seconds(stats, stage) == pytest.approx(
            {TimePart.COMPUTE: 10.0, TimePart.STARVED: 10.0, TimePart.IDLE: 5.0}
        )


def test_hops_and_thinking_are_told_apart() -> None:
    pipe = VirtualPipe(1, [0.0], hop_s=0.25, think_s=0.5)
    pipe.run([1.0] * 10, max_in_flight=1)
    parts = seconds(pipe.accounting.stats(pipe.now), 0)
    # A result on its way back counts as the engine's: it lacks what it needs for a plan.
    assert parts[TimePart.COMPUTE] == pytest.approx(10.0)
    assert parts[TimePart.COMMUNICATION] == pytest.approx(10 * 0.25)
    assert parts[TimePart.SCHEDULER] == pytest.approx(10 * 0.5 + 9 * 0.25)


def test_uneven_micro_batches_are_bubbles() -> None:
    pipe = VirtualPipe(2, [0.0, 0.0])
    steps = [1.0, 3.0] * 200
    pipe.run(steps, max_in_flight=2)
    stats = pipe.accounting.stats(pipe.now)
    assert stats.batch_imbalance == pytest.approx(1 - 4 / 6, rel=0.01)
    assert stats.stage_imbalance == pytest.approx(0.0)
    compute_s = seconds(stats, 0)[TimePart.COMPUTE]
    assert compute_s / stats.wall_s == pytest.approx(4 / 6, rel=0.01)


@given(
    num_stages=st.integers(1, 4),
    spare=st.integers(0, 1),
    steps=st.lists(st.floats(0.001, 2.0), min_size=1, max_size=40),
    hop_s=st.sampled_from([0.0, 1e-3, 0.3]),
    think_s=st.sampled_from([0.0, 1e-3, 0.3]),
    far_clock_s=st.sampled_from([-7e4, 0.0, 7e4]),
)
def test_parts_sum_to_the_wall(
    num_stages: int,
    spare: int,
    steps: list[float],
    hop_s: float,
    think_s: float,
    far_clock_s: float,
) -> None:
    offsets = [far_clock_s if stage % 2 else 0.0 for stage in range(num_stages)]
    pipe = VirtualPipe(num_stages, offsets, hop_s, think_s)
    pipe.run(steps, num_stages + spare, has_more=False)
    stats = pipe.accounting.stats(pipe.now + random.random())
    for stage, account in enumerate(stats.stages):
        assert min(account.seconds.values()) >= 0.0
        assert account.seconds[TimePart.COMPUTE] == pytest.approx(sum(steps))
        unknown_s = 1e-6 + (2 * hop_s + 1e-4 * stats.wall_s if offsets[stage] else 0.0)
        assert sum(account.seconds.values()) == pytest.approx(stats.wall_s, abs=unknown_s)


def test_the_prediction_is_scaled_to_what_all_stages_took() -> None:
    accounting = PipeAccounting(2, START, predicted_s=[3.0, 1.0])
    accounting.submitted(0, START)
    accounting.observe(StageTiming(0, 0, START, 0.0, 0.0, 0.0, 5.0, 0.0))
    accounting.observe(StageTiming(1, 0, START, 0.0, 0.0, 5.0, 3.0, 0.0))
    stages = accounting.stats(START + 8.0).stages
    assert [(stage.step_s, stage.predicted_s) for stage in stages] == [(5.0, 6.0), (3.0, 2.0)]


def test_steps_of_a_lost_pipe_become_waiting() -> None:
    pipe = VirtualPipe(1, [0.0])
    pipe.run([1.0, 1.0], max_in_flight=1)
    pipe.accounting.submitted(7, pipe.now)  # whose worker dies
    pipe.accounting.lost()
    pipe.accounting.settled(False, pipe.now + 1.0)
    stats = pipe.accounting.stats(pipe.now + 3.0)
    assert sum(stats.stages[0].seconds.values()) == pytest.approx(stats.wall_s)
    assert stats.stages[0].seconds[TimePart.IDLE] == pytest.approx(2.0)
    pipe.accounting.submitted(8, pipe.now + 3.0)
    pipe.accounting.observe(StageTiming(0, 8, pipe.now + 2.0, 1.0, 0.0, 0.0, 1.0, 0.0))
    stats = pipe.accounting.stats(pipe.now + 4.0)
    assert sum(stats.stages[0].seconds.values()) == pytest.approx(stats.wall_s)
    assert stats.stages[0].seconds[TimePart.COMPUTE] == pytest.approx(3.0)


def wait_for_all_steps(engine: EngineConnection) -> PipeStats:
    """Until nothing is in flight and every stage has reported: two tellings with equal compute."""
    computed: list[float] = []
    while True:
        message = engine.receive_any()
        if isinstance(message, PipeStats):
            latest = [stage.seconds[TimePart.COMPUTE] for stage in message.stages]
            if min(latest) > 0 and latest == computed:
                return message
            computed = latest


def test_a_real_pipe_accounts_for_all_its_time(tmp_path: Path) -> None:
    layout = ParallelLayout(tp=1, stage_layers=(2, 1))
    with running_engine(save_tiny("llama", tmp_path), layout) as engine:
        engine.generate(make_requests(24, seed=5))
        stats = wait_for_all_steps(engine)
    for stage in stats.stages:
        assert sum(stage.seconds.values()) == pytest.approx(stats.wall_s, rel=0.02)
        assert stage.seconds[TimePart.IDLE] > 0
        assert stage.step_s > 0
    assert 0 <= stats.batch_imbalance < 1
    assert 0 < stats.stage_imbalance < 1
