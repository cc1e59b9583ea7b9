"""Rules that hold under any sequence of arrivals, aborts, preemptions and late results."""

from dataclasses import replace
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shardline_scheduler import DuplicateRequest, QueueFull, Scheduler, SchedulerConfig

from .pipe import Pipe
from .reference_worker import VOCAB_SIZE

pytestmark = pytest.mark.timeout(900)  # A failure is shrunk for up to five minutes.

MAX_PROMPT_TOKENS = 16
MAX_TOKENS = 20

# Prompts begin alike, so that prefixes are shared, and part at any token.
prompts = st.builds(
    lambda base, length, tail: [*([0, 1, 2, 3] * 4, [0, 1] * 8, [4] * 16)[base][:length], *tail],
    st.integers(0, 2),
    st.integers(1, MAX_PROMPT_TOKENS - 3),
    st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=3),
)
samplings = st.fixed_dictionaries(
    {
        "max_tokens": st.integers(1, MAX_TOKENS),
        "min_tokens": st.integers(0, 3),
        "seed": st.integers(0, 2),
        "stop_token_ids": st.sampled_from([(), (), (1,), (2, 3)]),
        "num_prompt_logprobs": st.sampled_from([None, None, None, 1]),
    }
)


@st.composite
def configs(draw: st.DrawFn) -> SchedulerConfig:
    block_size = draw(st.integers(1, 5))
    num_needed = -(-(MAX_PROMPT_TOKENS + MAX_TOKENS - 1) // block_size)
    max_num_seqs = draw(st.integers(1, 6))
    plans_ahead = draw(st.booleans())
    return SchedulerConfig(
        num_blocks=num_needed + draw(st.sampled_from([0, 1, 3, 6, 50])),
        block_size=block_size,
        max_model_len=MAX_PROMPT_TOKENS + MAX_TOKENS,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + draw(st.integers(0, 20)),
        max_num_waiting=8,
        num_stages=draw(st.integers(1, 4)),
        max_in_flight=None if plans_ahead else draw(st.sampled_from([None, None, 1, 3, 5])),
        plans_ahead=plans_ahead,
        enable_prefix_cache=draw(st.booleans()),
    )


class AnySequence(RuleBasedStateMachine):
    """Everything that can happen to a scheduler, in any order; at the end everybody finishes."""

    @initialize(config=configs())
    def start(self, config: SchedulerConfig) -> None:
        self.pipe = Pipe(Scheduler(config))
        self.num_added = 0

    @rule(requests=st.lists(st.tuples(prompts, samplings), min_size=1, max_size=4))
    def add(self, requests: list[tuple[list[int], dict[str, object]]]) -> None:
        for prompt, sampling in requests:
            self._add(prompt, sampling)

    def _add(self, prompt: list[int], sampling: dict[str, object]) -> None:
        stats = self.pipe.scheduler.stats()
        self.num_added += 1
        if stats.num_waiting >= self.pipe.config.max_num_waiting:
            with pytest.raises(QueueFull):
                self.pipe.add(str(self.num_added), prompt, **sampling)
        else:
            self.pipe.add(str(self.num_added), prompt, **sampling)

    @rule(choice=st.integers(0, 100))
    def abort(self, choice: int) -> None:
        alive = [name for name, stream in self.pipe.streams.items() if not stream.finish_reason]
        if alive:
            assert self.pipe.abort(alive[choice % len(alive)])

    @rule()
    def abort_again(self) -> None:
        finished = [name for name, stream in self.pipe.streams.items() if stream.finish_reason]
        assert not any(map(self.pipe.scheduler.abort, finished))

    @rule(choice=st.integers(0, 100))
    def add_again(self, choice: int) -> None:
        alive = [name for name, stream in self.pipe.streams.items() if not stream.finish_reason]
        if alive:
            with pytest.raises(DuplicateRequest):
                self.pipe.add(alive[choice % len(alive)], [0])

    @rule()
    def plan(self) -> None:
        self.pipe.plan()

    @rule()
    def fill(self) -> None:
        while self.pipe.plan() is not None:
            pass

    @precondition(lambda self: self.pipe.in_flight)
    @rule()
    def commit(self) -> None:
        self.pipe.commit()

    @rule()
    def lose_everything(self) -> None:
        self.pipe.lose_everything()

    @invariant()
    def nothing_leaks(self) -> None:
        self.pipe.scheduler.check()

    def teardown(self) -> None:
        if hasattr(self, "pipe"):
            self.pipe.drain()


def run(config: SchedulerConfig, random: Random, num_requests: int, abort_rate: float) -> Pipe:
    """Requests come one by one while the pipe is kept between empty and full."""
    pipe = Pipe(Scheduler(config))
    for i in range(num_requests):
        base = random.choice(([0, 1, 2, 3] * 4, [4] * 16))
        num_shared = random.randint(0, MAX_PROMPT_TOKENS - 1)
        prompt = [*base[:num_shared], random.randrange(VOCAB_SIZE)]
        pipe.add(
            str(i),
            prompt,
            max_tokens=random.randint(1, MAX_TOKENS),
            stop_token_ids=random.choice([(), (), (1,)]),
            min_tokens=random.choice([0, 2]),
            num_prompt_logprobs=random.choice([None, None, 0]),
        )
        for _ in range(random.choice([0, 0, 1, 4])):
            if random.random() < 0.6 or not pipe.in_flight:
                pipe.plan()
            else:
                pipe.commit()
        if random.random() < abort_rate:
            pipe.abort(str(random.randrange(i + 1)))
        pipe.scheduler.check()
    pipe.drain()
    return pipe


@given(config=configs(), random=st.randoms(use_true_random=True))
@settings(max_examples=500, deadline=None)
def test_everybody_finishes_as_if_alone(config: SchedulerConfig, random: Random) -> None:
    run(replace(config, max_num_waiting=100), random, num_requests=12, abort_rate=0.1)


@given(config=configs(), seed=st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_the_prefix_cache_changes_no_token(config: SchedulerConfig, seed: int) -> None:
    config = replace(config, max_num_waiting=100)
    without, cached = (
        run(replace(config, enable_prefix_cache=enabled), Random(seed), 12, 0.0).streams
        for enabled in (False, True)
    )
    assert {name: stream.tokens for name, stream in without.items()} == {
        name: stream.tokens for name, stream in cached.items()
    }


@given(config=configs(), seed=st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_planning_ahead_changes_no_token(config: SchedulerConfig, seed: int) -> None:
    config = replace(config, max_in_flight=None, max_num_waiting=100)
    without, ahead = (
        run(replace(config, plans_ahead=plans_ahead), Random(seed), 12, 0.0).streams
        for plans_ahead in (False, True)
    )
    assert {name: (stream.tokens, stream.finish_reason) for name, stream in without.items()} == {
        name: (stream.tokens, stream.finish_reason) for name, stream in ahead.items()
    }


TestAnySequence = AnySequence.TestCase
TestAnySequence.settings = settings(
    max_examples=150,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
