"""Latency budgets in a real engine with real workers: refused, kept, ended, told and counted."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from tests.engine_process import EngineConnection, Outcome, running_engine
from tests.tiny import save_tiny

from shardline_scheduler import ClassStats, LatencyBudget, OnMiss, Priority
from shardline_scheduler.plan import SamplingParams
from shardline_server.messages import Delta, PipeStats
from shardline_shards.layout import ParallelLayout

TWO_STAGES = ParallelLayout(tp=1, stage_layers=(2, 1))
# So long that a busy machine, too, may promise it.
AN_HOUR = LatencyBudget(ttft_ms=3.6e6, tpot_ms=3.6e5, deadline_ms=3.6e6)
NOTHING = LatencyBudget(ttft_ms=0.001)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def engine(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineConnection]:
    """It has measured its steps, and has KV memory for 384 tokens."""
    cache = str(tmp_path_factory.mktemp("cache"))
    with running_engine(
        model, TWO_STAGES, measure_s=1.0, num_kv_blocks=24, cache_dir=cache
    ) as connection:
        yield connection


@pytest.fixture(scope="module")
def unmeasured(model: Path) -> Iterator[EngineConnection]:
    """It knows nothing of its steps yet, so it refuses nobody."""
    with running_engine(model, TWO_STAGES, measure_s=0.0) as connection:
        yield connection


def submit(engine: EngineConnection, name: str, budget: LatencyBudget, num_output: int = 5) -> None:
    sampling = SamplingParams(max_tokens=num_output, seed=0, temperature=0.0)
    engine.submit(name, range(3, 53), sampling, budget)


def result(engine: EngineConnection, name: str) -> tuple[Outcome, Delta]:
    """What came of it, once it is over; and the terminal record."""
    engine.wait(lambda: engine.outcomes[name].finish_reason is not None)
    return engine.outcomes[name], engine.outcomes[name].deltas[-1]


def counted(engine: EngineConnection) -> ClassStats:
    assert engine.stats is not None
    (stats,) = [one for one in engine.stats.classes if one.priority is Priority.STANDARD]
    return stats


def test_a_budget_that_is_kept_is_told_beside_its_prediction_and_counted(engine) -> None:
    submit(engine, "kept", AN_HOUR)
    outcome, last = result(engine, "kept")
    assert (outcome.finish_reason, len(outcome.token_ids)) == ("length", 5)
    told = last.budget
    assert told is not None and told.met
    assert 0 < told.ttft_ms < told.e2e_ms < 3.6e6 and told.tpot_ms > 0
    assert told.predicted.ttft_ms > 0 and told.predicted.tpot_ms > 0
    assert all(delta.budget is None for delta in outcome.deltas[:-1])
    assert (counted(engine).num_met, counted(engine).num_ttft) == (1, 1)


def test_what_no_server_could_keep_is_refused_at_once(engine) -> None:
    before = counted(engine).num_refused if engine.stats else 0
    submit(engine, "never", NOTHING)
    outcome, last = result(engine, "never")
    assert (outcome.finish_reason, outcome.token_ids) == ("error", [])
    assert last.error_code == "BudgetImpossible" and last.refusal is not None
    assert last.refusal.asked == NOTHING and last.refusal.retry_after_s is None
    assert last.refusal.predicted.ttft_ms > 0.001
    assert counted(engine).num_refused == before + 1


def test_what_does_not_fit_now_is_told_what_is_short_and_passes_later(engine) -> None:
    submit(engine, "first", AN_HOUR, num_output=200)
    submit(engine, "second", AN_HOUR, num_output=200)
    _, last = result(engine, "second")
    assert last.error_code == "BudgetUnmet" and "KV memory is short, not time" in last.error_message
    assert last.refusal is not None and last.refusal.retry_after_s > 0
    assert result(engine, "first")[1].budget.met
    submit(engine, "again", AN_HOUR, num_output=200)
    again = result(engine, "again")[1]
    assert again.error_message is None and again.budget.met
    assert engine.stats.num_used_kv_blocks == 0


def test_nobody_waits_for_his_refusal_until_a_whole_burst_is_judged(engine) -> None:
    """They come as they are decided, a few at a time, though all of them were there at once."""
    names = [f"burst-{i}" for i in range(100)]
    with engine.paused():
        for name in names:
            submit(engine, name, NOTHING)
    engine.wait(lambda: all(engine.outcomes[name].finish_reason for name in names))
    assert max(engine.num_deltas) < 20


def test_a_hard_budget_that_is_lost_ends_its_request_and_frees_its_blocks(unmeasured) -> None:
    submit(unmeasured, "lost", NOTHING, num_output=100)
    outcome, last = result(unmeasured, "lost")
    assert outcome.finish_reason == "deadline"
    assert last.budget is not None and not last.budget.met
    unmeasured.wait(lambda: unmeasured.stats.num_used_kv_blocks == 0)
    assert counted(unmeasured).num_missed == 1


def test_what_no_server_could_keep_is_known_as_soon_as_steps_have_been_seen(unmeasured) -> None:
    """Before, nothing is known of any budget: it ends when it is lost, as in the test above."""
    submit(unmeasured, "teacher", LatencyBudget(), num_output=20)
    assert result(unmeasured, "teacher")[0].finish_reason == "length"
    submit(unmeasured, "never", NOTHING)
    assert result(unmeasured, "never")[1].error_code == "BudgetImpossible"


def test_a_soft_budget_that_is_lost_is_served_all_the_same(unmeasured) -> None:
    submit(unmeasured, "late", LatencyBudget(ttft_ms=0.001, on_miss=OnMiss.DEGRADE))
    outcome, last = result(unmeasured, "late")
    assert (outcome.finish_reason, len(outcome.token_ids)) == ("length", 5)
    assert last.budget is not None and not last.budget.met


def test_an_idle_engine_measures_again_after_it_has_called_something_impossible(
    model: Path, tmp_path: Path
) -> None:
    """It does not say so: that there were more steps than requests need shows it, and nothing else
    that is counted does.
    """
    with running_engine(model, TWO_STAGES, measure_s=0.5, cache_dir=str(tmp_path)) as engine:
        submit(engine, "never", NOTHING)
        assert result(engine, "never")[1].error_code == "BudgetImpossible"
        num_before = engine.stats.num_steps
        for number in count(1):
            while not isinstance(engine.receive_any(), PipeStats):
                pass
            submit(engine, f"usual-{number}", AN_HOUR, num_output=1)
            assert result(engine, f"usual-{number}")[0].finish_reason == "length"
            if engine.stats.num_steps - num_before > 4 * number:
                break
        stats = counted(engine)
        assert (stats.num_met, stats.num_refused) == (number, 1)
        assert engine.stats.num_prefix_queries == 50 * number
