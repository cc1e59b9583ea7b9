"""Workers die under running streams, and no stream ends, loses a token or says another one."""

import asyncio
import contextlib
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import httpx
import psutil
import pytest
from tests.engine_process import EngineConnection, running_engine
from tests.server.chaos import run as run_chaos
from tests.server.conftest import running_engine_process
from tests.server.running import running_frontend
from tests.server.streams import NUM_STREAMS, read_streams
from tests.tiny import VOCAB_SIZE, save_tiny

from shardline_scheduler.plan import SamplingParams
from shardline_shards.layout import ParallelLayout, Place

LAYOUTS = {
    "1x2": ParallelLayout(tp=1, stage_layers=(2, 1)),
    "2x1": ParallelLayout(tp=2, stage_layers=(3,)),
    "2x2": ParallelLayout(tp=2, stage_layers=(1, 2)),
    "1x3": ParallelLayout(tp=1, stage_layers=(1, 1, 1)),
}
AHEAD = {
    "1x1-ahead": ParallelLayout(tp=1, stage_layers=(3,)),
    "2x1-ahead": LAYOUTS["2x1"],
    "2x2-ahead": LAYOUTS["2x2"],
    "1x3-ahead": LAYOUTS["1x3"],
}
Requests = dict[str, tuple[list[int], SamplingParams]]


class HasPid(Protocol):
    pid: int


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def requests() -> Requests:
    """Half of them greedy, half sampled; some share a beginning; some want logprobs."""
    rng = random.Random(0)
    shared = [rng.randrange(3, VOCAB_SIZE) for _ in range(40)]
    requests: Requests = {}
    for number in range(NUM_STREAMS):
        tokens = [rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randint(1, 60))]
        sampling = SamplingParams(
            max_tokens=rng.randint(60, 150),
            seed=number,
            temperature=number % 2,
            num_logprobs=0 if number % 5 == 0 else None,
        )
        requests[str(number)] = (shared + tokens if number % 3 == 0 else tokens, sampling)
    return requests


@pytest.fixture(scope="module")
def undisturbed(model: Path, requests: Requests) -> dict[str, list[int]]:
    with running_engine(model, ParallelLayout(tp=1, stage_layers=(3,))) as engine:
        return {name: outcome.token_ids for name, outcome in engine.generate(requests).items()}


@pytest.fixture(scope="module", params=LAYOUTS | AHEAD)
def engine(request: pytest.FixtureRequest, model: Path) -> Iterator[EngineConnection]:
    layout, plans_ahead = (LAYOUTS | AHEAD)[request.param], request.param in AHEAD
    options = {"max_num_batched_tokens": 128, "plans_ahead": plans_ahead}
    with running_engine(model, layout, **options) as connection:
        connection.layout = layout
        yield connection


def workers(engine: HasPid) -> dict[str, psutil.Process]:
    """Those of this engine, by name; other tests' engines may be there as well."""
    found = {}
    for child in psutil.Process(engine.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            name = " ".join(child.cmdline())
            if "worker stage" in name:
                found[name] = child
    return found


def find_worker(engine: HasPid, place: Place) -> psutil.Process:
    part = f"stage={place.stage_index} tp={place.tp_rank}"
    return next(worker for name, worker in workers(engine).items() if part in name)


def find_spare(engine: HasPid) -> psutil.Process | None:
    for child in psutil.Process(engine.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "".join(child.cmdline()) == "shardline: worker":
                return child
    return None


def await_successor(engine: HasPid, place: Place, dead: psutil.Process) -> psutil.Process:
    """The process that takes the place of a dead worker, as soon as it has been told so."""
    while True:
        with contextlib.suppress(StopIteration):
            if (worker := find_worker(engine, place)) != dead:
                return worker
        time.sleep(0.005)


def start_streams(engine: EngineConnection, requests: Requests) -> None:
    for name, request in requests.items():
        engine.submit(name, *request)
    engine.wait(lambda: all(len(o.token_ids) > 5 for o in engine.outcomes.values()))


def finish_streams(engine: EngineConnection) -> dict[str, list[int]]:
    engine.wait(lambda: all(outcome.finish_reason for outcome in engine.outcomes.values()))
    tokens = {name: outcome.token_ids for name, outcome in engine.outcomes.items()}
    engine.outcomes.clear()
    return tokens


def read_disturbed(
    engine: EngineConnection,
    requests: Requests,
    place: Place,
    disturb: Callable[[psutil.Process], None],
) -> dict[str, list[int]]:
    """What the streams say under which a worker was disturbed.

    Once more where all had ended before the loss came: this process may be late, and no engine
    waits for it.
    """
    while True:
        victim = find_worker(engine, place)
        start_streams(engine, requests)
        disturb(victim)
        engine.wait(lambda: len(engine.losses) == 1)
        were_running = any(not outcome.finish_reason for outcome in engine.outcomes.values())
        tokens = finish_streams(engine)
        if were_running:
            return tokens
        engine.losses.clear()


def test_any_worker_may_die_under_running_streams(
    engine: EngineConnection, requests: Requests, undisturbed: dict[str, list[int]]
) -> None:
    for place in engine.layout.places():
        victim = find_worker(engine, place)
        others = [worker for worker in workers(engine).values() if worker != victim]
        assert read_disturbed(engine, requests, place, psutil.Process.kill) == undisturbed
        assert f"the worker of {place} was killed by signal 9, " in engine.losses.pop()
        assert not engine.losses
        assert all(worker.is_running() for worker in others), "the others keep their weights"
        assert engine.stats is not None
        assert engine.stats.num_used_kv_blocks == engine.stats.num_running == 0


@pytest.mark.parametrize("layout", ["1x2", "2x2"])
def test_workers_may_die_and_stop_while_others_are_brought_back(
    model: Path, requests: Requests, undisturbed: dict[str, list[int]], layout: str
) -> None:
    """The last dies as soon as the first is known to be dead, whose successor stops as it loads."""
    with running_engine(model, LAYOUTS[layout], max_num_batched_tokens=128) as engine:
        first, last = LAYOUTS[layout].places()[0], LAYOUTS[layout].places()[-1]
        start_streams(engine, requests)
        victim, next_victim = find_worker(engine, first), find_worker(engine, last)
        victim.kill()
        engine.wait(lambda: bool(engine.losses))
        next_victim.kill()
        successor = await_successor(engine, first, victim)
        successor.suspend()
        assert finish_streams(engine) == undisturbed
        assert not successor.is_running()


def test_streams_through_both_doors_outlive_a_worker_of_any_stage(tiny_model: Path) -> None:
    """Shards of a stage die under streams of both doors in `test_node_recovery`."""
    with (
        running_engine_process(tiny_model, pp=3, num_kv_blocks=1024) as engine,
        running_frontend(engine.wait_begun(), tiny_model) as running,
        httpx.Client(base_url=running.addresses.http_url, timeout=60) as probe,
    ):
        doors = (running.addresses.http_url, f"grpc://{running.addresses.grpc_target}")
        undisturbed = read_streams(doors[::-1], lambda: None)
        assert {said.finish_reason for said in undisturbed} == {"length", "stop"}
        for num_killed, (name, worker) in enumerate(sorted(workers(engine).items()), start=1):
            assert read_streams(doors, worker.kill) == undisturbed
            assert probe.get("/ready").status_code == 200
            stage, _ = re.findall(r"=(\d)", name)
            reason = f"stage {stage}, tp rank 0 was killed by signal 9"
            assert reason in probe.get("/health").json()["last_loss"]
            metrics = probe.get("/metrics").text
            assert f'recoveries_total{{model_name="tiny"}} {num_killed}.0' in metrics


def test_a_stopped_worker_is_held_dead_and_replaced(
    engine: EngineConnection, requests: Requests, undisturbed: dict[str, list[int]]
) -> None:
    place = engine.layout.places()[-1]
    assert read_disturbed(engine, requests, place, psutil.Process.suspend) == undisturbed
    assert f"held dead: {place}" in engine.losses.pop()


def test_a_spare_process_that_is_not_ready_is_not_waited_for(
    model: Path, requests: Requests, undisturbed: dict[str, list[int]]
) -> None:
    """It imports what it needs in idle time, which may not come for long; here it is stopped until
    a worker has died.
    """
    layout = LAYOUTS["1x2"]
    with running_engine(model, layout, max_num_batched_tokens=128) as engine:
        while (spare := find_spare(engine)) is None:
            time.sleep(0.01)
        spare.suspend()
        victim = find_worker(engine, layout.places()[0])
        start_streams(engine, requests)
        victim.kill()
        engine.wait(lambda: bool(engine.losses))
        with contextlib.suppress(psutil.NoSuchProcess):
            spare.resume()
        assert finish_streams(engine) == undisturbed
        assert not spare.is_running()


def test_who_kills_a_worker_twice_is_quarantined_and_the_rest_goes_on(
    model: Path, requests: Requests, undisturbed: dict[str, list[int]]
) -> None:
    """No front end lets a token through that the model does not have; a worker ends by it."""
    with running_engine(model, LAYOUTS["1x2"], max_num_batched_tokens=128) as engine:
        start_streams(engine, requests)
        engine.submit("poison", [5, VOCAB_SIZE + 5], SamplingParams(max_tokens=5, seed=0))
        engine.wait(lambda: all(outcome.finish_reason for outcome in engine.outcomes.values()))
        poison = engine.outcomes.pop("poison")
        assert (poison.finish_reason, poison.token_ids) == ("error", [])
        assert "last of two workers" in str(poison.deltas[-1].error_message)
        assert {name: o.token_ids for name, o in engine.outcomes.items()} == undisturbed
        assert len(engine.losses) == 2


def test_half_a_minute_of_chaos(tiny_model: Path) -> None:
    chaos = asyncio.run(run_chaos(tiny_model, seconds=30, seed=1))
    assert chaos.troubles["killed"]
