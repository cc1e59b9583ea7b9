"""A sweep over a machine whose prices are known, on as few steps as the first second has."""

from collections.abc import Iterator
from random import Random
from typing import Any, cast

import pytest
from tests.scheduler.machine import Prices

from shardline_scheduler import Scheduler, SchedulerConfig, StageModel, StepLoad
from shardline_scheduler.plan import StageTiming, StepPlan, StepResult
from shardline_server.sweep import SHAPES, Sweep

# Decodes read weights and are cheap together; prompts compute. What is before a chunk has a price.
MEMORY_BOUND: Prices = (5e-3, 0.1e-3, 0.3e-3, 0.8e-6, 0.0)
COMPUTE_BOUND: Prices = (1e-3, 0.6e-3, 0.6e-3, 0.8e-6, 0.36e-6)


def true_seconds(load: StepLoad) -> float:
    def under(prices: Prices) -> float:
        a, b, c, d, e = prices
        tokens = b * load.num_prefill_tokens + c * load.num_decodes
        return a + tokens + d * load.decode_context + e * load.prefill_context

    return max(under(MEMORY_BOUND), under(COMPUTE_BOUND))


class Machine:
    """Workers of one stage that take what the prices say, within some percent."""

    def __init__(self, noise: float) -> None:
        self.loads: list[StepLoad] = []
        self._noise, self._random = noise, Random(1)
        self._results: list[StepResult] = []

    def submit(self, plan: StepPlan) -> None:
        load = StepLoad.of(plan)
        self.loads.append(load)
        seconds = true_seconds(load) * self._random.uniform(1 - self._noise, 1 + self._noise)
        timing = StageTiming(0, plan.step_id, 0.0, 0.0, 0.0, 0.0, seconds, 0.0)
        drawn = [5] * len(plan.drawing_indexes)
        self._results.append(StepResult(plan.step_id, drawn, timing=timing))

    def poll(self, timeout_ms: int) -> bool:
        return bool(self._results)

    def results(self) -> Iterator[StepResult]:
        results, self._results = self._results, []
        return iter(results)


def swept(num_shapes: int, noise: float) -> tuple[Machine, StageModel]:
    machine = Machine(noise)
    scheduler = Scheduler(SchedulerConfig(num_blocks=4096, max_model_len=2048))
    sweep = Sweep(scheduler, cast(Any, machine), 1000)
    for _ in range(num_shapes):
        sweep.run_next()
    (samples,) = sweep.finish().samples
    return machine, StageModel.fitted(samples)


@pytest.mark.parametrize("num_shapes", [7, len(SHAPES)])
@pytest.mark.parametrize("noise", [0.0, 0.04])
def test_prices_are_found_of_what_servers_do(num_shapes: int, noise: float) -> None:
    _, model = swept(num_shapes, noise)
    loads = []
    for num_decodes, chunk, context in ((1, 0, 0), (8, 0, 0), (0, 64, 0), (0, 100, 600)):
        load = StepLoad(0, num_decodes, 200 * num_decodes, 0)
        load.add_prefill(chunk, context)
        loads.append(load)
    for load in loads:
        assert model.seconds(load) == pytest.approx(true_seconds(load), rel=0.12), load


def test_a_prompt_beside_decodes_is_tried() -> None:
    """They are dear there: a row each of a product that computes."""
    machine, model = swept(4, 0.02)
    assert any(load.num_decodes and load.has_prompts for load in machine.loads)
    mixed = StepLoad(0, 16, 16 * 260, 0)
    mixed.add_prefill(64, 0)
    assert model.seconds(mixed) == pytest.approx(true_seconds(mixed), rel=0.12)
