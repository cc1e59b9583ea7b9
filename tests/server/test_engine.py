"""The engine with real workers in every layout says what one model alone would say."""

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.engine_process import (
    EngineConnection,
    EngineDied,
    engine_config,
    running_engine,
    started_engine,
)
from tests.oracle import generate_greedily, load_oracle
from tests.tiny import VOCAB_SIZE, save_tiny

from shardline_scheduler.plan import SamplingParams
from shardline_shards.layout import ParallelLayout

LAYOUTS = {
    "1x1": ParallelLayout(tp=1, stage_layers=(3,)),
    "1x2": ParallelLayout(tp=1, stage_layers=(2, 1)),
    "2x1": ParallelLayout(tp=2, stage_layers=(3,)),
    "2x2": ParallelLayout(tp=2, stage_layers=(1, 2)),
    "3x1": ParallelLayout(tp=3, stage_layers=(3,)),
}
AHEAD = {
    "1x1-ahead": LAYOUTS["1x1"],
    "2x1-ahead": LAYOUTS["2x1"],
    "2x2-ahead": LAYOUTS["2x2"],
    "1x3-ahead": ParallelLayout(tp=1, stage_layers=(1, 1, 1)),
}
Requests = dict[str, tuple[list[int], SamplingParams]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module", params=LAYOUTS | AHEAD)
def engine(request: pytest.FixtureRequest, model: Path) -> Iterator[EngineConnection]:
    layout, plans_ahead = (LAYOUTS | AHEAD)[request.param], request.param in AHEAD
    options = {"max_num_batched_tokens": 128, "plans_ahead": plans_ahead}
    with running_engine(model, layout, **options) as connection:
        yield connection


@pytest.fixture(scope="module", params=["1x2", "1x1-ahead", "1x3-ahead"])
def tight_engine(request: pytest.FixtureRequest, model: Path) -> Iterator[EngineConnection]:
    """Stages or a step ahead, and so little KV memory that requests throw each other out."""
    layout, plans_ahead = (LAYOUTS | AHEAD)[request.param], request.param in AHEAD
    options = {"num_kv_blocks": 24, "block_size": 4, "plans_ahead": plans_ahead}
    with running_engine(model, layout, **options) as connection:
        yield connection


def make_requests(count: int, seed: int, **sampling: object) -> Requests:
    """Prompts of 1 to 90 tokens and 1 to 25 tokens to come; every third one shares a beginning."""
    rng = random.Random(seed)
    shared = [rng.randrange(3, VOCAB_SIZE) for _ in range(40)]
    requests: Requests = {}
    for number in range(count):
        tokens = [rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randint(1, 50))]
        params = {"max_tokens": rng.randint(1, 25), "seed": number, "temperature": 0.0} | sampling
        prompt = shared + tokens if number % 3 == 0 else tokens
        requests[f"request-{seed}-{number}"] = (prompt, SamplingParams(**params))
    return requests


def generate_alone(engine: EngineConnection, requests: Requests) -> dict[str, list[int]]:
    return {
        name: engine.generate({f"{name}-alone": request})[f"{name}-alone"].token_ids
        for name, request in requests.items()
    }


def generate_together(engine: EngineConnection, requests: Requests) -> dict[str, list[int]]:
    return {name: outcome.token_ids for name, outcome in engine.generate(requests).items()}


def test_greedy_tokens_are_those_of_the_model_alone(engine: EngineConnection, model: Path) -> None:
    oracle = load_oracle(model)
    requests = make_requests(12, seed=1)
    expected = {
        name: generate_greedily(oracle, prompt, sampling.max_tokens)
        for name, (prompt, sampling) in requests.items()
    }
    assert generate_together(engine, requests) == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_64_streams_equal_their_solo_runs_and_leave_no_block(
    engine: EngineConnection, temperature: float
) -> None:
    requests = make_requests(64, seed=2, temperature=temperature, top_p=0.9)
    together = generate_together(engine, requests)
    assert together == generate_alone(engine, requests)
    assert engine.stats is not None
    assert engine.stats.num_used_kv_blocks == engine.stats.num_running == 0


def test_same_seed_same_tokens_in_every_layout(engine: EngineConnection, model: Path) -> None:
    requests = make_requests(8, seed=3, temperature=0.8, top_k=20)
    tokens = generate_together(engine, requests)
    with running_engine(model, LAYOUTS["1x1"]) as other:
        assert tokens == generate_together(other, requests)


def test_preempted_requests_say_what_they_would_have_said(
    tight_engine: EngineConnection, model: Path
) -> None:
    requests = make_requests(24, seed=4, temperature=1.0)
    requests = {name: (prompt[:60], sampling) for name, (prompt, sampling) in requests.items()}
    tokens = generate_together(tight_engine, requests)
    assert tight_engine.stats is not None
    assert tight_engine.stats.num_preemptions > 0
    with running_engine(model, LAYOUTS["1x1"]) as roomy:
        assert tokens == generate_together(roomy, requests)


def test_an_abort_frees_blocks_while_others_run(engine: EngineConnection) -> None:
    long = SamplingParams(max_tokens=400, seed=0, temperature=0.0)
    engine.submit("aborted", [5, 6, 7], long)
    engine.submit("kept", [5, 6, 8], SamplingParams(max_tokens=100, seed=0, temperature=0.0))
    engine.wait(lambda: len(engine.outcomes["aborted"].token_ids) >= 3)
    engine.abort("aborted")
    kept = engine.outcomes["kept"]
    engine.wait(lambda: kept.finish_reason is not None)
    assert len(kept.token_ids) == 100
    assert engine.outcomes["aborted"].finish_reason is None
    assert engine.stats is not None
    assert engine.stats.num_used_kv_blocks == 0
    engine.outcomes.clear()


def test_prompt_logprobs_come_once_and_whole(engine: EngineConnection) -> None:
    prompt = [7 + number % 60 for number in range(200)]  # more than one step takes
    sampling = SamplingParams(
        max_tokens=2, seed=0, temperature=0.0, num_prompt_logprobs=1, num_logprobs=2
    )
    outcome = engine.generate({"logprobs": (prompt, sampling)})["logprobs"]
    entries = [entry for delta in outcome.deltas for entry in delta.prompt_logprobs]
    assert [entry.token_id for entry in entries] == prompt[1:]
    chosen = [entry for delta in outcome.deltas for entry in delta.logprobs]
    assert [entry.token_id for entry in chosen] == outcome.token_ids
    for entry in chosen:
        assert entry.top[0] == (entry.token_id, entry.logprob)


def test_what_can_never_fit_is_refused_with_the_limit(tight_engine: EngineConnection) -> None:
    sampling = SamplingParams(max_tokens=10, seed=0)
    outcome = tight_engine.generate({"long": ([5] * 100, sampling)})["long"]
    (delta,) = outcome.deltas
    assert delta.error_code == "PromptTooLong"
    assert delta.error_message is not None
    assert "97" in delta.error_message


@pytest.mark.parametrize("layout", ["1x1", "2x1", "1x2", "2x2"])
def test_planning_ahead_says_the_same_token_by_token(model: Path, layout: str) -> None:
    """With whatever looks at the tokens before, such as penalties, and whatever ends a request."""
    requests: Requests = {}
    for number, (name, (prompt, _)) in enumerate(make_requests(24, seed=5).items()):
        requests[name] = (
            prompt,
            SamplingParams(
                max_tokens=1 + number,
                seed=number,
                temperature=0.9 * (number % 2),
                presence_penalty=0.5 * (number % 3),
                frequency_penalty=0.3 * (number % 3),
                repetition_penalty=1.0 + 0.2 * (number % 4),
                min_tokens=min(number, 4),
                stop_token_ids=tuple(range(0, VOCAB_SIZE, 5)) if number % 2 else (),
                num_logprobs=number % 3 or None,
                num_prompt_logprobs=1 if number % 5 == 0 else None,
            ),
        )
    told = []
    for plans_ahead in (False, True):
        with running_engine(model, LAYOUTS[layout], plans_ahead=plans_ahead) as engine:
            told.append(engine.generate(requests))
            assert engine.stats is not None
            assert engine.stats.num_used_kv_blocks == 0
    plain, ahead = told
    reasons = {outcome.finish_reason for outcome in plain.values()}
    assert reasons == {"stop", "length"}, "both ends have to come"
    for name in requests:
        assert ahead[name].token_ids == plain[name].token_ids
        assert ahead[name].finish_reason == plain[name].finish_reason
        for kind in ("logprobs", "prompt_logprobs"):
            ours, theirs = (
                [entry for delta in outcome.deltas for entry in getattr(delta, kind)]
                for outcome in (ahead[name], plain[name])
            )
            assert [entry.token_id for entry in ours] == [entry.token_id for entry in theirs]
            assert [entry.logprob for entry in ours] == pytest.approx(
                [entry.logprob for entry in theirs], abs=1e-4
            )


def test_a_front_end_that_greets_after_a_failure_is_told_why(
    model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = engine_config(model, LAYOUTS["1x1"], num_kv_blocks=10**9)
    with started_engine(config) as (process, endpoint):
        logged = ""
        while "less by --num-kv-blocks" not in logged:
            logged += capfd.readouterr().err
            time.sleep(0.05)
        connection = EngineConnection(endpoint, process.pid)
        with pytest.raises(EngineDied, match="less by --num-kv-blocks"):
            connection.receive()
        connection.close()
        assert process.wait(timeout=60) == 2
