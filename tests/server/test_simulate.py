"""The scheduler on a virtual clock: reproducible, true to the formulas, and nothing gets lost."""

import json
import random
from pathlib import Path
from statistics import median

import pytest
from click.testing import CliRunner

from shardline_scheduler import FinishReason, LatencyBudget, SchedulerConfig
from shardline_server.cli import main
from shardline_server.engine_timeline import TimePart
from shardline_server.simulate.cluster import ROUTERS, Cluster
from shardline_server.simulate.prices import given_costs, make_noise
from shardline_server.simulate.replica import Replica, Visit
from shardline_server.simulate.report import summarize_pipes

COSTS = (10.0, 0.3, 1.0, 0.0005, 0.00002)
TIGHT = LatencyBudget(ttft_ms=1500, tpot_ms=80)


def config(num_stages: int, **settings: object) -> SchedulerConfig:
    defaults: dict[str, object] = {
        "num_blocks": 8192,
        "max_model_len": 8192,
        "num_stages": num_stages,
        "enable_prefix_cache": False,
    }
    return SchedulerConfig(**(defaults | settings))  # type: ignore[arg-type]


def cluster(
    num_replicas: int = 1,
    num_stages: int = 2,
    *,
    costs: tuple[float, ...] = COSTS,
    noise: float = 0.0,
    router: str = "earliest-finish",
    overhead_s: float = 1e-3,
    **settings: object,
) -> Cluster:
    model = given_costs(costs, num_stages)
    model.trip_overhead_s = overhead_s
    replicas = [
        Replica(config(num_stages, **settings), model, make_noise(noise, number))
        for number in range(num_replicas)
    ]
    return Cluster(replicas, ROUTERS[router])


def visits(
    count: int, rate: float, *, seed: int = 0, budget: LatencyBudget | None = None
) -> list[Visit]:
    rng, arrival_s, made = random.Random(seed), 0.0, []
    for number in range(count):
        arrival_s += rng.expovariate(rate)
        num_output = rng.randint(10, 60)
        made.append(
            Visit(
                number,
                arrival_s,
                [0] * rng.randint(1, 600),
                num_output,
                max_tokens=num_output,
                budget=budget or LatencyBudget(),
            )
        )
    return made


def outcomes(made: list[Visit]) -> list[tuple[object, ...]]:
    return [(list(v.token_times_s), v.finish_reason, repr(v.refusal)) for v in made]


def run(made: list[Visit], **settings: object) -> Cluster:
    simulated = cluster(**settings)  # type: ignore[arg-type]
    simulated.run(made)
    return simulated


def test_the_same_seed_gives_the_same_run() -> None:
    runs = [visits(60, 8.0, seed=seed, budget=TIGHT) for seed in (1, 1, 2)]
    for made in runs:
        run(made, num_replicas=3, noise=0.1)
    first, again, other = map(outcomes, runs)
    assert first == again
    assert first != other


def test_every_token_is_computed_once_and_every_visit_ends_once() -> None:
    made = visits(200, 12.0)
    simulated = run(made, num_replicas=2, num_stages=3)
    assert all(len(v.token_times_s) == v.num_output_tokens for v in made)
    assert all(v.finish_reason is not None and v.refusal is None for v in made)
    # The last token of each is drawn, and not computed.
    expected = sum(len(v.prompt) + v.num_output_tokens - 1 for v in made)
    assert sum(r.num_computed_tokens for r in simulated.replicas) == expected
    assert all(list(v.token_times_s) == sorted(v.token_times_s) for v in made)
    assert min(v.token_times_s[0] - v.arrival_s for v in made) > 3 * 10e-3


def test_answers_end_where_the_trace_says_though_the_scheduler_allows_more() -> None:
    made = visits(50, 5.0)
    for visit in made:
        visit.max_tokens = 1000
    run(made, num_blocks=100_000)
    assert [len(v.token_times_s) for v in made] == [v.num_output_tokens for v in made]
    assert {v.finish_reason for v in made} == {FinishReason.STOP}


def test_utilisation_is_the_mean_micro_batch_over_the_longest() -> None:
    """Two decodes in two micro-batches, of which one reads twenty times as much context."""
    a_ms, d_ms, num_output = 10.0, 0.01, 400
    long, short = [0] * 2000, [0] * 100
    made = [
        Visit(0, 0.0, long, num_output, num_output),
        Visit(1, 0.0, short, num_output, num_output),
    ]
    simulated = cluster(costs=(a_ms, 0.0, 0.0, d_ms, 0.0), overhead_s=0.0)
    simulated.run(made)

    def used(num_said: float) -> float:
        times = [a_ms + d_ms * (len(prompt) + num_said) for prompt in (long, short)]
        return sum(times) / 2 / max(times)

    pipes = summarize_pipes(simulated.replicas, simulated.now)
    assert pipes.utilisation == pytest.approx(used(num_output / 2), rel=0.01)
    # What is lost lately, of two steps a token, is told as uneven micro-batches.
    assert pipes.batch_imbalance == pytest.approx(1 - used(num_output - 50), rel=0.02)
    for shares in pipes.stage_shares:
        assert sum(shares.values()) == pytest.approx(1.0)
        assert shares[TimePart.COMPUTE] + shares[TimePart.STARVED] == pytest.approx(1.0, abs=0.01)


def test_one_stage_that_always_has_work_is_always_used() -> None:
    made = visits(40, 1000.0)
    simulated = cluster(num_stages=1, overhead_s=0.0)
    simulated.run(made)
    assert summarize_pipes(simulated.replicas, simulated.now).utilisation == pytest.approx(1.0)


def test_past_capacity_admission_keeps_what_it_promises() -> None:
    goodput = {}
    for policy in ("edf", "fcfs"):
        made = visits(400, 20.0, budget=TIGHT)
        run(made, policy=policy)
        met = [v for v in made if v.refusal is None and v.finish_reason and _is_met(v)]
        admitted = [v for v in made if v.refusal is None]
        goodput[policy] = len(met)
        if policy == "edf":
            assert len(met) == len(admitted) < len(made)
            assert min(v.refusal.retry_after_s for v in made if v.refusal) > 0  # type: ignore[attr-defined]
    assert goodput["edf"] > 2 * goodput["fcfs"]


@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_first_tokens_come_when_admission_said(num_stages: int) -> None:
    """On a pipe that does what the model says, of which half is used."""
    made = visits(200, 2.0, budget=TIGHT)
    run(made, num_stages=num_stages, costs=tuple(cost / num_stages for cost in COSTS))
    told = [visit.outcome for visit in made if visit.outcome is not None]
    errors = [abs(one.predicted.ttft_ms / one.ttft_ms - 1) for one in told]  # type: ignore[operator]
    assert len(errors) == len(made)
    assert median(errors) < 0.1


def _is_met(visit: Visit) -> bool:
    ttft_ms = (visit.token_times_s[0] - visit.arrival_s) * 1e3
    gaps = max(1, len(visit.token_times_s) - 1)
    tpot_ms = (visit.token_times_s[-1] - visit.token_times_s[0]) / gaps * 1e3
    assert TIGHT.ttft_ms is not None and TIGHT.tpot_ms is not None
    return ttft_ms <= TIGHT.ttft_ms and tpot_ms <= TIGHT.tpot_ms


@pytest.mark.parametrize("router", ROUTERS)
def test_routers_spread_the_load(router: str) -> None:
    made = visits(300, 30.0)
    simulated = run(made, num_replicas=3, router=router)
    shares = [replica.num_computed_tokens for replica in simulated.replicas]
    assert min(shares) > 0.8 * max(shares)


COMMAND = "simulate --stages 2 --cost 10,0.3,1,0.0005,0.00002 --rate 2 --num-requests 40 --seed 3"


def test_the_command_reports_the_same_for_the_same_seed(tmp_path: Path) -> None:
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    for file in files:
        budget = ["--budget", "interactive:ttft=1500,tpot=200", "--noise", "0.1"]
        png = ["--png", str(file.with_suffix(".png"))]
        result = CliRunner().invoke(main, [*COMMAND.split(), *budget, "--json", str(file), *png])
        assert result.exit_code == 0, result.output
        assert "40 ok, 0 refused" in result.output
        assert "where the stages' time went" in result.output
        assert file.with_suffix(".png").stat().st_size > 0
        assert file.with_suffix(".pipe.png").stat().st_size > 0
    first, again = (json.loads(file.read_text()) for file in files)
    assert first == again
    assert first["points"][0]["summary"]["budget"]["attainment"] == 1.0
    (pipe,) = first["server"]["pipes"]
    assert [sum(shares.values()) for shares in pipe["stage_shares"]] == pytest.approx([1.0, 1.0])


def test_costs_that_a_server_kept_are_found(tmp_path: Path) -> None:
    import msgspec

    kept = tmp_path / "step-costs" / "0123.json"
    kept.parent.mkdir()
    kept.write_bytes(msgspec.json.encode(given_costs(COSTS, 2)))
    words = ["simulate", "--rate", "5", "--num-requests", "10", "--cache", str(tmp_path)]
    assert CliRunner().invoke(main, words).exit_code == 0
    result = CliRunner().invoke(main, [*words, "--stages", "3"])
    assert result.exit_code == 2
    assert "no server has kept what steps of 3 stages cost" in result.output
    result = CliRunner().invoke(main, [*words, "--costs", str(kept), "--stages", "3"])
    assert "is of 2 stages and --stages is 3" in result.output
    kept.write_bytes(kept.read_bytes().replace(b'"only_decodes":', b'"residuals":'))
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2, "what another version has kept is taken in part, without a word"
    assert "unknown field `residuals`" in result.output and "serve the model again" in result.output
    kept.write_bytes(b"{}")
    result = CliRunner().invoke(main, words)
    assert "holds no costs of steps" in result.output


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--cost", "1,2"], "five numbers"),
        (["--cost", "0,1,1,1,1", "--rate", "1"], "the first above"),
        (["--cost", "1,1,1,1,1"], "give --rate or --trace"),
        (["--cost", "1,1,1,1,1", "--costs", "x.json"], "give one of them"),
        (["--cost", "1,1,1,1,1", "--rate", "1", "--max-num-seqs", "4096"], "below max_num_seqs"),
        (["--cost", "1,1,1,1,1", "--trace", "no-such-file"], "no-such-file"),
    ],
)
def test_wrong_words_are_refused_in_one_line(words: list[str], problem: str) -> None:
    result = CliRunner().invoke(main, ["simulate", *words])
    assert result.exit_code == 2
    assert problem in result.output
    assert "Traceback" not in result.output


def test_the_command_knows_every_router() -> None:
    (option,) = [p for p in main.commands["simulate"].params if p.name == "router"]
    assert set(option.type.choices) == set(ROUTERS)  # type: ignore[attr-defined]
