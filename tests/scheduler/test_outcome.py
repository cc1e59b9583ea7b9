"""How a finished request went beside its latency budget."""

import pytest

from shardline_scheduler import (
    BudgetOutcome,
    BudgetPrediction,
    LatencyBudget,
    Request,
    Scheduler,
    SchedulerConfig,
)
from shardline_scheduler.plan import SamplingParams

from .pipe import Pipe


def outcome(times: list[float], **budget: float) -> BudgetOutcome:
    """Of a request that arrives at 0 and gets a token at each of `times`, in seconds."""
    p = Pipe(Scheduler(SchedulerConfig(num_blocks=10, max_model_len=100, max_num_seqs=2)))
    sampling = SamplingParams(max_tokens=len(times), seed=0)
    request = Request("a", [1, 2], sampling, LatencyBudget(**budget))
    p.scheduler.add(request, 0.0)
    for time in times:
        plan = p.scheduler.plan(time)
        assert plan is not None
        (output,) = p.scheduler.commit(p.worker.execute(plan), time)
        assert (output.budget is None) == (output.finish_reason is None)
    assert output.budget is not None
    return output.budget


def test_times_are_milliseconds_from_arrival():
    assert outcome([0.5, 0.75, 1.0]) == BudgetOutcome(
        met=True, ttft_ms=500, tpot_ms=250, e2e_ms=1000, predicted=BudgetPrediction()
    )


def test_one_token_has_no_time_between_tokens():
    assert outcome([0.5], tpot_ms=1) == BudgetOutcome(
        met=True, ttft_ms=500, tpot_ms=None, e2e_ms=500, predicted=BudgetPrediction()
    )


@pytest.mark.parametrize("limit", [{"ttft_ms": 500}, {"tpot_ms": 250}, {"deadline_ms": 1000}])
def test_each_limit_counts(limit: dict[str, float]):
    times = [0.5, 0.75, 1.0]
    assert outcome(times, **limit).met
    assert not outcome(times, **{name: value - 1 for name, value in limit.items()}).met
