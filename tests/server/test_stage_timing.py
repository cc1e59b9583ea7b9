"""What workers tell of their time, from a real group of two stages driven without an engine."""

from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from tests.engine_process import TIMEOUT_MS, engine_config
from tests.tiny import save_tiny

from shardline_scheduler.plan import (
    Chunk,
    NewRequest,
    SamplingParams,
    StageTiming,
    StepPlan,
)
from shardline_server.worker_group import WorkerGroup
from shardline_shards.gate import Gate
from shardline_shards.layout import ParallelLayout
from shardline_shards.messages import StageReport

LAYOUT = ParallelLayout(tp=1, stage_layers=(2, 1))
NUM_STEPS = 5


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[WorkerGroup]:
    config = engine_config(save_tiny("llama", tmp_path), LAYOUT)
    gate = Gate(config.keys)
    group = WorkerGroup(config, gate)
    group.start()
    yield group
    group.stop()
    gate.close()


def chunk_plans(chunk: int, count: int) -> list[StepPlan]:
    """One prompt, its chunks behind one another; a token is drawn after the last."""
    prompt = [5 + number % 90 for number in range(chunk * count)]
    new = NewRequest(0, prompt, len(prompt), SamplingParams(max_tokens=1, seed=0))
    block_ids = list(range(-(-len(prompt) // 16)))
    return [
        StepPlan(
            step,
            new_requests=[] if step else [new],
            chunks=[Chunk(0, step * chunk, chunk, [] if step else block_ids, step == count - 1)],
        )
        for step in range(count)
    ]


def collect(workers: WorkerGroup) -> tuple[dict[int, list[StageTiming]], list[StageReport]]:
    """The timings of every step by stage, and the messages that bore those of the first."""
    timings: dict[int, list[StageTiming]] = defaultdict(list)
    reports = []
    while {stage: len(of_stage) for stage, of_stage in timings.items()} != {0: 5, 1: 5}:
        assert workers.poll(TIMEOUT_MS), f"only {dict(timings)} have come"
        for message in workers.results():
            if isinstance(message, StageReport):
                reports.append(message)
                new = message.timings
            else:
                assert message.timing is not None
                new = [message.timing]
            for timing in new:
                timings[timing.stage_index].append(timing)
    return timings, reports


def test_each_stage_accounts_for_its_time_without_a_gap(workers: WorkerGroup) -> None:
    for plan in chunk_plans(chunk=20, count=NUM_STEPS):
        workers.submit(plan)
    timings, reports = collect(workers)
    for of_stage in timings.values():
        assert [timing.step_id for timing in of_stage] == list(range(NUM_STEPS))
        assert all(timing.compute_s > 0 for timing in of_stage)
        for timing, following in pairwise(of_stage):
            assert following.started_at == pytest.approx(timing.ended_at, abs=1e-6)
    assert all(timing.tensor_wait_s < 1e-3 for timing in timings[0]), "stage 0 waits for none"
    for first, second in zip(timings[0], timings[1], strict=True):
        sent_at = first.ended_at - first.send_s
        assert second.received_at > sent_at, "one clock: nothing arrives before it was sent"
    assert all(report.sent_at >= report.timings[-1].ended_at for report in reports)
