"""The cost model finds the coefficients of a known machine, and stays sane where it cannot."""

from collections.abc import Iterator
from random import Random

import msgspec
import pytest

from shardline_scheduler import PipeModel, Sample, StageModel, StepLoad
from shardline_scheduler.cost_model import MIN_SAMPLES

# seconds: fixed, a prefill token, a decode, a token of decode context, of prefill context
MACHINE = (10e-3, 0.6e-3, 1e-3, 1e-6, 0.2e-6)


def random_load(random: Random, max_chunk: int = 400) -> StepLoad:
    load = StepLoad()
    for _ in range(random.randint(0, 30)):
        load.add(1, random.randint(1, 2000))
    if random.random() < 0.7:
        load.add(random.randint(2, max_chunk), random.randint(0, 2000))
    if not load.num_tokens:
        load.add(1, 5)
    return load


def true_seconds(load: StepLoad, machine: tuple[float, ...] = MACHINE) -> float:
    a, b, c, d, e = machine
    return (
        a
        + b * load.num_prefill_tokens
        + c * load.num_decodes
        + d * load.decode_context
        + e * load.prefill_context
    )


def trained(num_samples: int, noise: float = 0.0, seed: int = 0) -> StageModel:
    random, model = Random(seed), StageModel()
    for _ in range(num_samples):
        load = random_load(random)
        model.observe(load, true_seconds(load) * random.uniform(1 - noise, 1 + noise))
    return model


def errors(model: StageModel, machine: tuple[float, ...] = MACHINE) -> list[float]:
    random = Random(99)
    loads = [random_load(random) for _ in range(200)]
    return sorted(abs(model.seconds(load) / true_seconds(load, machine) - 1) for load in loads)


def test_an_exact_machine_is_found_exactly():
    model = trained(600)
    assert errors(model)[-1] < 0.01
    assert model.compute_bound.coefficients == pytest.approx(MACHINE, rel=0.1)
    assert model.compute_bound.with_prompts.margin < 0.01


def test_noise_goes_into_the_margin_and_not_into_the_fit():
    model = trained(600, noise=0.2)
    assert errors(model)[100] < 0.05
    assert 0.1 < model.compute_bound.with_prompts.margin < 0.25
    load = random_load(Random(7))
    assert model.planned_seconds(load) > model.seconds(load)


def test_what_makes_decodes_uneven_makes_no_prompt_dear():
    """A few milliseconds more or less are a large part of a decode, and a small one of a chunk."""
    random, model = Random(2), StageModel(knee=256)
    decodes, chunk = StepLoad(), StepLoad()
    decodes.add(1, 300)
    chunk.add(100, 300)
    for _ in range(300):
        for load in (decodes, chunk):
            model.observe(load, true_seconds(load) + random.uniform(0.0, 6e-3))
    assert model.planned_seconds(decodes) > 1.15 * model.seconds(decodes)
    assert model.planned_seconds(chunk) < 1.06 * model.seconds(chunk)


def test_small_steps_that_are_uneven_make_no_prompt_dear():
    """The ends of prompts, beside a decode: what is uneven is the part that they take anyway."""
    random, model = Random(3), StageModel(knee=32)
    for _ in range(300):
        end, chunk = StepLoad(), StepLoad()
        end.add(1, 300)
        end.add(random.randint(2, 16), 300)
        chunk.add(random.randint(64, 128), random.randint(0, 500))
        model.observe(end, true_seconds(end) + random.uniform(0.0, 12e-3))
        model.observe(chunk, true_seconds(chunk) * random.uniform(0.97, 1.03))
    prompt = StepLoad()
    prompt.add(256, 0)
    assert model.memory_bound.with_prompts.margin > 0.15
    added_s = true_seconds(prompt) - true_seconds(StepLoad())
    assert model.work_seconds(prompt) == pytest.approx(added_s, rel=0.15)


def test_no_coefficient_is_negative_where_features_go_together():
    random, model = Random(1), StageModel()
    for _ in range(300):  # Contexts all alike: their sum says no more than their number.
        load = StepLoad()
        for _ in range(random.randint(1, 30)):
            load.add(1, 100)
        model.observe(load, (0.01 + 0.001 * load.num_decodes) * random.uniform(0.9, 1.1))
    assert min(model.memory_bound.coefficients) >= 0


def test_until_it_has_seen_enough_it_predicts_the_longest():
    model, load = StageModel(), StepLoad(num_decodes=1, decode_context=1)
    for i in range(1, MIN_SAMPLES):
        model.observe(load, float(i))
        assert model.seconds(load) == i
    model.observe(load, 1.0)
    assert model.seconds(load) < MIN_SAMPLES - 1


def test_one_outlier_is_dropped_and_a_slower_machine_is_learnt():
    model = trained(300, noise=0.05)
    load = random_load(Random(3))
    before = model.seconds(load)
    model.observe(load, 10 * before)
    assert model.seconds(load) == before
    slower = tuple(2 * value for value in MACHINE)
    random = Random(4)
    for _ in range(2000):
        load = random_load(random)
        model.observe(load, true_seconds(load, slower) * random.uniform(0.95, 1.05))
    assert errors(model, slower)[100] < 0.05


def test_what_was_not_seen_for_long_keeps_its_price():
    model = trained(300)
    for i in range(3000):
        load = StepLoad(num_decodes=8, decode_context=800 + i % 7)
        model.observe(load, true_seconds(load))
    load = StepLoad()
    load.add(30, 0)
    assert model.seconds(load) == pytest.approx(true_seconds(load), rel=0.05)


def test_a_sweep_finds_the_knee():
    samples = []
    random = Random(5)
    for _ in range(80):
        load = random_load(random)
        flat = 0.02 + 1e-5 * load.num_tokens
        steep = 0.02 + 1e-3 * (load.num_tokens - 128)
        samples.append(Sample(load, steep if load.num_tokens > 128 else flat))
    assert StageModel.fitted(samples).knee == 128


@pytest.mark.parametrize("context", [0, 1000])
@pytest.mark.parametrize("seconds", [0.02, 0.05, 0.5])
def test_tokens_within_a_time_take_that_time(seconds: float, context: int):
    model = trained(600)
    load = StepLoad()
    load.add(1, 50)
    num_tokens = model.tokens_within(seconds, load, context)
    load.add(num_tokens, context)
    assert model.planned_seconds(load) <= seconds * 1.001
    load.add(4, context + num_tokens)
    assert model.planned_seconds(load) > seconds


def test_without_a_time_limit_any_number_of_tokens_fits():
    load = StepLoad()
    load.add(1, 50)
    model = trained(600)
    assert model.tokens_within(float("inf"), load, 0) > 1_000_000
    model.compute_bound.fit.coefficients[1:] = [0.0] * 4
    assert model.tokens_within(1.0, load, 0) > 1_000_000


def test_a_pipe_is_as_fast_as_its_slowest_stage_and_as_long_as_all():
    random, pipe = Random(0), PipeModel.of_size(2)
    assert not pipe.is_ready
    for _ in range(400):
        load = random_load(random)
        pipe.stages[0].observe(load, true_seconds(load))
        pipe.stages[1].observe(load, 2 * true_seconds(load))
    assert pipe.is_ready
    load = random_load(random)
    one = true_seconds(load)
    for _ in range(200):
        pipe.observe_trip(load, 3 * one + 0.004)
    assert pipe.expected_step_seconds(load) == pytest.approx(2 * one, rel=0.01)
    assert pipe.expected_trip_seconds(load) == pytest.approx(3 * one + 0.004, rel=0.01)


def test_it_survives_being_written_down():
    pipe = PipeModel([trained(50), trained(50, seed=1)])
    copy = msgspec.json.decode(msgspec.json.encode(pipe), type=PipeModel)
    assert copy == pipe
    load = random_load(Random(3))
    copy.stages[0].observe(load, 0.1)
    pipe.stages[0].observe(load, 0.1)
    assert copy == pipe


def first_steps(random: Random) -> Iterator[StepLoad]:
    """A few short prompts at a time, and then many steps of ten decodes or so."""
    for _ in range(4):
        for _ in range(random.randint(1, 12)):
            load = StepLoad()
            for _ in range(random.randint(1, 4)):
                load.add(random.randint(2, 40), 0)
            for _ in range(random.randint(0, 10)):
                load.add(1, random.randint(10, 120))
            yield load
        for i in range(150):
            load = StepLoad()
            for _ in range(random.randint(10, 11)):
                load.add(1, 20 + i)
            yield load


@pytest.mark.parametrize("seed", range(20))
def test_what_the_first_steps_cannot_tell_apart_gets_no_price_by_chance(seed: int):
    """As on a busy machine that was given no time to measure: one step of 20 is a stall."""
    random, model = Random(seed), StageModel()
    asked = [random_load(random) for _ in range(50)]
    for load in first_steps(random):
        stall = random.uniform(3, 10) if random.random() < 0.05 else 1
        model.observe(load, true_seconds(load) * random.lognormvariate(0, 0.2) * stall)
        if model.is_trusted:
            for other in asked:
                planned = max(model.planned_seconds(other), model.work_seconds(other))
                assert planned < 30 * true_seconds(other), (model, other)


def test_one_stall_among_the_first_steps_says_nothing_of_the_others():
    model, load = StageModel(), StepLoad(num_decodes=8, decode_context=800)
    for _ in range(MIN_SAMPLES + 1):
        model.observe(load, 0.01)
    model.observe(load, 0.2)
    assert model.planned_seconds(load) == pytest.approx(0.01, rel=0.01)
    model.observe(load, 0.2)
    assert model.planned_seconds(load) == pytest.approx(0.2, rel=0.01)


def test_three_stalls_among_twenty_steps_say_nothing_of_the_others_and_six_do():
    model, load = StageModel(), StepLoad(num_decodes=8, decode_context=800)
    for _ in range(20):
        model.observe(load, 0.01)
    for _ in range(3):
        model.observe(load, 0.2)
    assert model.planned_seconds(load) == pytest.approx(0.01, rel=0.01)
    for _ in range(3):
        model.observe(load, 0.2)
    assert model.planned_seconds(load) > 0.1
