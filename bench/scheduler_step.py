"""What a step costs the engine: microseconds of planning and committing, by running requests.

Run as `python bench/scheduler_step.py`. All requests decode, so each step plans and commits one
micro-batch of R / p of them. Figures are medians over the steps; block growth and prefix hashing
happen in them.
"""

from collections import deque
from statistics import median
from time import perf_counter

from shardline_scheduler import Request, Scheduler, SchedulerConfig
from shardline_scheduler.plan import SampledToken, SamplingParams, StepPlan, StepResult

NUM_STEPS = 128
NUM_PROMPT_TOKENS = 64
NUM_BLOCKS = 1_000_000


def decoding_scheduler(num_running: int, num_stages: int) -> Scheduler:
    """A scheduler whose requests have their prompts behind them and nothing in flight."""
    config = SchedulerConfig(
        num_blocks=NUM_BLOCKS,
        max_model_len=NUM_BLOCKS,
        max_num_seqs=num_running,
        max_num_batched_tokens=num_running * NUM_PROMPT_TOKENS,
        max_num_waiting=num_running,
        num_stages=num_stages,
    )
    scheduler = Scheduler(config)
    sampling = SamplingParams(max_tokens=NUM_STEPS * num_stages + 2, seed=0)
    for i in range(num_running):
        prompt = list(range(i, i + NUM_PROMPT_TOKENS))
        scheduler.add(Request(str(i), prompt, sampling), 0.0)
    plan = scheduler.plan(0.0)
    assert plan is not None and len(plan.scheduled) == num_running
    scheduler.commit(execute(plan), 0.0)
    return scheduler


def execute(plan: StepPlan) -> StepResult:
    """The result of a plan, drawn by nobody."""
    tokens = [SampledToken(part.request_index, plan.step_id, None) for part in plan.scheduled]
    return StepResult(plan.step_id, tokens, [])


def seconds_per_step(num_running: int, num_stages: int) -> list[float]:
    """Times of one plan and one commit each, with the pipe full."""
    scheduler = decoding_scheduler(num_running, num_stages)
    in_flight: deque[StepPlan] = deque()
    times = []
    for _ in range(NUM_STEPS):
        start = perf_counter()
        plan = scheduler.plan(0.0)
        seconds = perf_counter() - start
        assert plan is not None
        in_flight.append(plan)
        if len(in_flight) == num_stages:
            result = execute(in_flight.popleft())
            start = perf_counter()
            scheduler.commit(result, 0.0)
            times.append(seconds + perf_counter() - start)
    return times


def main() -> None:
    """Print the table."""
    print(f"{'stages':>6} {'running':>8} {'us/step':>8} {'us/running':>11} {'us/planned':>11}")
    for num_stages in (1, 4):
        for num_running in (100, 1_000, 10_000):
            us = 1e6 * median(seconds_per_step(num_running, num_stages))
            per_running, per_planned = us / num_running, us / num_running * num_stages
            print(
                f"{num_stages:>6} {num_running:>8} {us:>8.0f} "
                f"{per_running:>11.2f} {per_planned:>11.2f}"
            )


if __name__ == "__main__":
    main()
