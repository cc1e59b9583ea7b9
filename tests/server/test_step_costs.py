"""Whether a fit is still that of this machine, and what an engine does that doubts it."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.engine_process import engine_config
from tests.scheduler.machine import Prices, exact_model
from tests.tiny import save_tiny

from shardline_scheduler import (
    BudgetImpossible,
    LatencyBudget,
    PipeModel,
    Request,
    Sample,
    Scheduler,
    SchedulerConfig,
    StepLoad,
)
from shardline_scheduler.cost_model import KNEES
from shardline_scheduler.plan import SamplingParams
from shardline_server.second_look import SecondLook
from shardline_server.step_costs import CostCache, StepCosts, distance, error_of
from shardline_server.sweep import Measurements, shapes_for
from shardline_server.worker_group import WorkerGroup, WorkerLost
from shardline_shards.gate import Gate
from shardline_shards.layout import ParallelLayout, Place

DECODES = [StepLoad(0, count, 64 * count, 0) for count in range(1, 13)]
PROMPTS = [StepLoad(64, 0, 0, 2016), StepLoad(128, 0, 0, 8128)]
CONFIG = SchedulerConfig(num_blocks=4096, max_model_len=2048)
NOW: Prices = (10e-3, 1e-3, 1e-3, 0.0, 0.0)


def measured(prices: Prices) -> Measurements:
    (stage,) = exact_model([prices]).stages
    return Measurements([[Sample(load, stage.seconds(load)) for load in DECODES + PROMPTS]])


@pytest.mark.parametrize("wrong", [1, 2])
def test_a_fit_that_is_wrong_for_prompts_or_for_decodes_alone_is_seen(wrong: int) -> None:
    """Most steps that are measured are decodes, and must not outvote the prompts."""
    assert error_of(exact_model([NOW]), measured(NOW)) == pytest.approx(0.0)
    kept = tuple(5 * price if i == wrong else price for i, price in enumerate(NOW))
    assert error_of(exact_model([kept]), measured(NOW)) > 1.0


def test_nothing_measured_is_no_reason_to_doubt_it() -> None:
    assert error_of(exact_model([NOW]), Measurements([[]])) == 0.0


def test_fits_that_plan_with_other_margins_are_apart() -> None:
    same, careful = exact_model([NOW]), exact_model([NOW])
    assert distance(same, exact_model([NOW]), measured(NOW)) == 0.0
    (stage,) = careful.stages
    for part in (stage.memory_bound, stage.compute_bound):
        part.widen(2.0)
    assert distance(careful, same, measured(NOW)) == pytest.approx(2.0)


@pytest.mark.parametrize("knee", KNEES)
def test_in_either_range_there_are_decodes_near_and_far_from_their_beginnings(knee: int) -> None:
    """Else noise tells what context costs from what a decode costs, and steps that are never tried
    may be priced at anything.
    """
    shapes = [shape for shape in shapes_for(CONFIG) if shape.num_outputs > 1]
    for contexts in (
        {shape.num_tokens for shape in shapes if shape.count <= knee},
        {shape.num_tokens for shape in shapes if shape.count > knee},
    ):
        assert not contexts or max(contexts) > 10 * min(contexts)


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[WorkerGroup]:
    """Two stages that are ready, and wait for plans."""
    model = save_tiny("llama", tmp_path / "llama")
    layout = ParallelLayout(tp=1, stage_layers=(2, 1))
    config = engine_config(model, layout, num_kv_blocks=24, measure_s=0.5)
    gate = Gate(config.keys)
    group = WorkerGroup(config, gate)
    try:
        group.start()
        yield group
    finally:
        group.kill()
        gate.close()


class Engine:
    """What of an engine's loop takes part in this."""

    def __init__(self, workers: WorkerGroup, model: PipeModel, is_called: Callable[[], bool]):
        config = workers.config
        self.scheduler = Scheduler(config.scheduler_config(24), cost_model=model)
        self.cache = CostCache(Path(config.cache_dir), config)
        costs = StepCosts(self.scheduler, workers, self.cache, 0.5, vocab_size=config.vocab_size)
        look = costs.second_look(is_called)
        assert isinstance(look, SecondLook)
        self.look = look

    def is_impossible(self) -> bool:
        """Whether an hour is too little for fifty tokens and five."""
        sampling = SamplingParams(max_tokens=5, seed=0)
        budget = LatencyBudget(ttft_ms=3.6e6, tpot_ms=3.6e5)
        request = Request("asked", list(range(3, 53)), sampling, budget)
        try:
            self.scheduler.add(request, time.monotonic())
        except BudgetImpossible:
            return True
        self.scheduler.abort("asked")
        return False

    def look_again(self) -> int:
        """In how many turns."""
        self.look.want()
        num_turns = 0
        while self.look.is_due(time.monotonic()):
            self.look.go_on()
            self.scheduler.check()
            assert not self.scheduler.has_work
            num_turns += 1
        return num_turns


WRONG: Prices = (1e6, 1e6, 1e6, 0.0, 0.0)


@pytest.fixture(params=["coefficients", "margins"])
def wrong_model(request: pytest.FixtureRequest) -> PipeModel:
    if request.param == "coefficients":
        return exact_model([WRONG, WRONG])
    model = exact_model([NOW, NOW])
    for stage in model.stages:
        for part in (stage.memory_bound, stage.compute_bound):
            part.widen(1e9)
    return model


@pytest.mark.parametrize("is_called", [False, True])
def test_costs_that_make_everything_impossible_are_mended(
    workers: WorkerGroup, wrong_model: PipeModel, is_called: bool
) -> None:
    """Also where somebody calls at every turn, so that a sweep is interrupted for ever."""
    engine = Engine(workers, wrong_model, lambda: is_called)
    assert engine.is_impossible()
    assert engine.look_again() > 1
    assert not engine.is_impossible()
    kept = engine.cache.load()
    assert kept is not None and not Engine(workers, kept, lambda: False).is_impossible()
    assert engine.look_again() == 0, "soon after, the same takes no time again"


def test_totals_and_shares_are_those_of_requests_alone(workers: WorkerGroup) -> None:
    engine = Engine(workers, exact_model([WRONG, WRONG]), lambda: False)
    assert engine.is_impossible()
    before = engine.scheduler.stats()
    engine.look_again()
    after = engine.scheduler.stats()
    assert after.num_steps > before.num_steps
    assert after.classes == before.classes and after.accuracy == before.accuracy
    assert (after.num_prefix_queries, after.num_used_kv_blocks) == (0, 0)


def test_a_worker_that_dies_meanwhile_leaves_no_request_behind(workers: WorkerGroup) -> None:
    engine = Engine(workers, exact_model([WRONG, WRONG]), lambda: False)
    victim = workers._workforce.local._workers[Place(1, 0)].process
    victim.kill()
    with pytest.raises(WorkerLost):
        engine.look_again()
    assert not engine.scheduler.has_requests
    engine.scheduler.requeue_all(time.monotonic())
    engine.scheduler.check()
