"""What a step costs the engine, and what an arrival does, in microseconds.

Run as `python bench/scheduler_step.py`. Steps: all requests decode, so each step plans and commits
one micro-batch of R / p of them (one stage that plans `ahead`: all of them, while the step before
is in flight); block growth and prefix hashing happen in them. Those who are `promised` something
have a limit on their time per token, `guests` none. Arrivals: a thousand requests with a limit on
their first token wait. Medians, with garbage collected as in the engine.
"""

from collections import deque
from collections.abc import Callable
from statistics import median, quantiles
from time import perf_counter

from shardline_scheduler import (
    BudgetRefused,
    LatencyBudget,
    PipeModel,
    Request,
    Scheduler,
    SchedulerConfig,
)
from shardline_scheduler.plan import SamplingParams, StepPlan, StepResult
from shardline_server.engine import calm_garbage_collector
from shardline_server.simulate.prices import given_costs

NUM_STEPS = 128
NUM_PROMPT_TOKENS = 64
NUM_BLOCKS = 1_000_000
NUM_QUEUED, NUM_ARRIVALS = 1_000, 500
# Milliseconds, of a machine that is fast enough for whatever is asked of it here.
COSTS = (0.05, 0.0001, 0.0001, 1e-7, 1e-9)
UNLIMITED = LatencyBudget()
PATIENT = LatencyBudget(tpot_ms=10_000)


def make_scheduler(
    num_running: int, num_stages: int, num_waiting: int, model: PipeModel, *, ahead: bool = False
) -> Scheduler:
    config = SchedulerConfig(
        num_blocks=NUM_BLOCKS,
        max_model_len=NUM_BLOCKS,
        max_num_seqs=num_running,
        max_num_batched_tokens=num_running * NUM_PROMPT_TOKENS,
        max_num_waiting=num_waiting,
        num_stages=num_stages,
        plans_ahead=ahead,
    )
    return Scheduler(config, cost_model=model)


def decoding_scheduler(
    num_running: int, num_stages: int, budget: LatencyBudget, *, ahead: bool
) -> Scheduler:
    """A scheduler whose requests have their prompts behind them and nothing in flight."""
    model = given_costs(COSTS, num_stages)
    scheduler = make_scheduler(num_running, num_stages, num_running, model, ahead=ahead)
    sampling = SamplingParams(max_tokens=NUM_STEPS * num_stages + 2, seed=0)
    for i in range(num_running):
        prompt = list(range(i, i + NUM_PROMPT_TOKENS))
        scheduler.add(Request(str(i), prompt, sampling, budget), 0.0)
    while scheduler.stats().num_waiting:
        plan = scheduler.plan(0.0)
        assert plan is not None
        scheduler.commit(execute(plan), 0.0)
    return scheduler


def execute(plan: StepPlan) -> StepResult:
    """The result of a plan, drawn by nobody."""
    return StepResult(plan.step_id, [plan.step_id] * len(plan.drawing_indexes))


def seconds_per_step(
    num_running: int, num_stages: int, budget: LatencyBudget, *, ahead: bool = False
) -> list[float]:
    """Times of one plan and one commit each, with the pipe full."""
    scheduler = decoding_scheduler(num_running, num_stages, budget, ahead=ahead)
    calm_garbage_collector()
    in_flight: deque[StepPlan] = deque()
    times = []
    for _ in range(NUM_STEPS):
        start = perf_counter()
        plan = scheduler.plan(0.0)
        seconds = perf_counter() - start
        assert plan is not None
        in_flight.append(plan)
        if len(in_flight) == scheduler.config.in_flight_limit:
            result = execute(in_flight.popleft())
            start = perf_counter()
            scheduler.commit(result, 0.0)
            times.append(seconds + perf_counter() - start)
    return times


def queueing_scheduler(num_queued: int) -> Scheduler:
    """A scheduler with so many in the queue, each due when the one before it is, and a bit."""
    model = given_costs((10, 0.3, 0.01, 5e-7, 2e-5), 2)
    scheduler = make_scheduler(4 * num_queued, 2, 2 * num_queued, model)
    sampling = SamplingParams(max_tokens=2, seed=0)
    for i in range(num_queued):
        budget = LatencyBudget(ttft_ms=2_000 + 200 * i)
        scheduler.add(Request(str(i), [i] * 256, sampling, budget), 0.0)
    calm_garbage_collector()
    return scheduler


def seconds_of_arrivals(scheduler: Scheduler, budget: Callable[[int], LatencyBudget]):
    """Times of arrivals one by one, each admitted one leaving again; and how many were refused."""
    sampling, times, num_refused = SamplingParams(max_tokens=64, seed=0), [], 0
    for i in range(NUM_ARRIVALS):
        request = Request(f"new-{i}", [i] * 256, sampling, budget(i))
        start = perf_counter()
        try:
            scheduler.add(request, 0.0)
        except BudgetRefused:
            num_refused += 1
        times.append(perf_counter() - start)
        scheduler.abort(request.request_id)
    return times, num_refused


def print_steps() -> None:
    columns = ("stages", "running", "who", "us/step", "us/running", "us/planned")
    print(" ".join(f"{name:>11}" for name in columns))
    for num_stages, ahead in ((1, False), (1, True), (2, False), (4, False)):
        for num_running in (32, 1_000, 10_000):
            for who, budget in (("guests", UNLIMITED), ("promised", PATIENT)):
                us = 1e6 * median(seconds_per_step(num_running, num_stages, budget, ahead=ahead))
                per_running = us / num_running
                print(
                    f"{'1 ahead' if ahead else num_stages:>11} {num_running:>11} {who:>11} "
                    f"{us:>11.0f} {per_running:>11.2f} {per_running * num_stages:>11.2f}"
                )


def print_arrivals() -> None:
    print(f"\nAn arrival while {NUM_QUEUED} wait, us: median, p99 (of {NUM_ARRIVALS}; refused)")
    kinds: dict[str, Callable[[int], LatencyBudget]] = {
        "no limit": lambda i: UNLIMITED,
        "due last": lambda i: LatencyBudget(ttft_ms=400_000),
        "due in the middle": lambda i: LatencyBudget(ttft_ms=100_000 + 10 * i),
        "too tight for the queue": lambda i: LatencyBudget(ttft_ms=400),
        "refused for now": lambda i: LatencyBudget(ttft_ms=400_000, tpot_ms=25),
        "impossible": lambda i: LatencyBudget(ttft_ms=1),
    }
    for name, budget in kinds.items():
        times, num_refused = seconds_of_arrivals(queueing_scheduler(NUM_QUEUED), budget)
        p99 = quantiles(times, n=100)[98]
        print(f"{name:>24} {1e6 * median(times):>8.0f} {1e6 * p99:>8.0f} {num_refused:>6}")


if __name__ == "__main__":
    print_steps()
    print_arrivals()
