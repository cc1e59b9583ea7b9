"""What the scheduler does, one readable behaviour at a time."""

import pytest

from shardline_scheduler import (
    DuplicateRequest,
    FinishReason,
    QueueFull,
    Request,
    RequestTooLong,
    Scheduler,
    SchedulerConfig,
    StepLoad,
)
from shardline_scheduler.plan import SamplingParams, StepPlan, StepResult

from .parts import parts_of
from .pipe import Pipe


def pipe(**settings: object) -> Pipe:
    defaults = {
        "num_blocks": 100,
        "block_size": 4,
        "max_model_len": 200,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
    }
    return Pipe(Scheduler(SchedulerConfig(**defaults | settings)))  # type: ignore[arg-type]


def chunks(plan: StepPlan | None) -> list[tuple[int, int, int]]:
    """Index, first token and number of tokens of each part."""
    assert plan is not None
    return [
        (part.request_index, part.num_computed_tokens, part.num_scheduled_tokens)
        for part in parts_of(plan)
    ]


def step(p: Pipe) -> StepPlan:
    """One plan and its result, with nothing else in flight."""
    plan = p.plan()
    assert plan is not None
    p.commit()
    return plan


def test_chunks_of_a_prompt_follow_each_other_before_any_result():
    p = pipe(num_stages=3, max_num_batched_tokens=8)
    p.add("a", [1] * 20)
    assert [chunks(p.plan()) for _ in range(3)] == [[(0, 0, 8)], [(0, 8, 8)], [(0, 16, 4)]]
    assert [chunk.samples for plan in p.in_flight for chunk in plan.chunks] == [0, 0, 1]
    p.drain()


def test_a_decode_waits_for_its_token():
    p = pipe(num_stages=2)
    p.add("a", [1] * 4)
    assert chunks(p.plan()) == [(0, 0, 4)]
    assert p.plan() is None
    (output,) = p.commit()
    plan = p.plan()
    assert chunks(plan) == [(0, 4, 1)]
    assert plan.decodes.token_ids == [*output.token_ids]


def test_a_step_takes_its_share_of_the_decodes():
    p = pipe(num_stages=2)
    for name in "abcde":
        p.add(name, [1], max_tokens=9)
    p.plan()
    p.commit()
    assert chunks(p.plan()) == [(0, 1, 1), (1, 1, 1), (2, 1, 1)]
    assert chunks(p.plan()) == [(3, 1, 1), (4, 1, 1)]


def test_one_more_step_in_flight_makes_the_shares_smaller():
    p = pipe(num_stages=2, max_in_flight=3)
    for name in "abcdef":
        p.add(name, [1], max_tokens=9)
    step(p)
    assert [len(chunks(p.plan())) for _ in range(3)] == [2, 2, 2]


def test_the_oldest_token_goes_first():
    p = pipe(num_stages=2, max_num_seqs=3)
    for name in "abc":
        p.add(name, [1], max_tokens=9)
    step(p)
    turns = [[index for index, _, _ in chunks(step(p))] for _ in range(3)]
    assert turns == [[0, 1], [2, 0], [1, 2]]


def test_decodes_come_first_then_prefills_then_the_queue():
    p = pipe(max_num_batched_tokens=8)
    p.add("decode", [1] * 2, max_tokens=9)
    step(p)
    p.add("prefill", [2] * 12)
    assert chunks(step(p)) == [(0, 2, 1), (1, 0, 7)]
    p.add("waiting", [3] * 9)
    assert chunks(step(p)) == [(0, 3, 1), (1, 7, 5), (2, 0, 2)]
    p.drain()


def test_nobody_overtakes_in_the_queue():
    p = pipe(num_blocks=6, max_num_seqs=8)
    p.add("running", [1] * 12, max_tokens=2)
    p.add("too large for now", [2] * 16, max_tokens=2)
    p.add("small", [3], max_tokens=2)
    assert chunks(step(p)) == [(0, 0, 12)]
    assert chunks(step(p)) == [(0, 12, 1)]
    assert chunks(p.plan()) == [(1, 0, 16), (2, 0, 1)]


def test_running_requests_are_limited():
    p = pipe(max_num_seqs=2)
    for name in "abc":
        p.add(name, [1] * 2, max_tokens=2)
    assert [len(chunks(step(p))) for _ in range(2)] == [2, 2]
    assert chunks(p.plan()) == [(2, 0, 2)]


def test_the_last_to_come_steps_back_and_returns_first():
    p = pipe(num_blocks=5, block_size=2)
    p.add("old", [1] * 3, max_tokens=5)
    p.add("young", [2] * 3, max_tokens=5)
    step(p)
    p.add("later", [3], max_tokens=5)
    step(p)
    assert chunks(step(p)) == [(0, 4, 1)], "one block is left for two, and the first takes it"
    assert chunks(step(p)) == [(0, 5, 1)], "the other keeps what it has and waits"
    assert p.scheduler.stats().num_preemptions == 0
    plan = step(p)
    assert chunks(plan) == [(0, 6, 1)]
    assert (plan.released, plan.new_requests) == ([1], [])
    assert p.scheduler.stats().num_preemptions == 1
    plan = p.plan()
    assert plan.released == [0]
    returning, later = plan.new_requests
    assert returning.token_ids == [2] * 3 + p.streams["young"].tokens
    assert (returning.request_index, returning.num_prompt_tokens) == (2, 3)
    assert later.token_ids == [3]
    p.drain()


def test_a_token_in_flight_of_a_preempted_request_is_drawn_again():
    p = pipe(num_blocks=4, block_size=2, num_stages=2)
    p.add("old", [1] * 3, max_tokens=4)
    p.add("young", [2] * 2, max_tokens=4)
    step(p)
    assert chunks(p.plan()) == [(0, 3, 1)]
    assert chunks(p.plan()) == [(1, 2, 1)]
    p.commit()
    plan = p.plan()
    assert (chunks(plan), plan.released) == ([(0, 4, 1)], [1])
    assert p.commit() == [], "a result for an index that is not current is dropped"
    assert len(p.streams["young"].tokens) == 1
    p.drain()  # Asserts that no token is missing or told twice.


def test_nobody_who_is_in_the_step_is_preempted_by_it():
    p = pipe(num_blocks=3, block_size=2)
    p.add("a", [1] * 2, max_tokens=5)
    p.add("b", [2], max_tokens=5)
    p.drain()


def test_refusals_name_the_numbers_and_leave_no_trace():
    p = pipe(max_num_waiting=1, num_blocks=10)
    with pytest.raises(
        RequestTooLong, match=r"39 prompt tokens and max_tokens 3 make 42 .* 41 fit"
    ):
        p.add("memory", [1] * 39, max_tokens=3)
    p.add("memory", [1] * 39, max_tokens=2)
    with pytest.raises(DuplicateRequest, match="'memory'"):
        p.add("memory", [1])
    with pytest.raises(QueueFull, match="1 requests are waiting and the limit is 1"):
        p.add("more", [1])
    step(p)
    p.add("more", [1])
    p.drain()
    p = pipe(max_model_len=20)
    with pytest.raises(RequestTooLong) as refusal:
        p.add("context", [1] * 16, max_tokens=5)
    assert refusal.value.max_num_tokens == 20
    assert not p.scheduler.has_work


def test_an_id_may_be_used_again_after_the_end():
    p = pipe()
    p.add("a", [1], max_tokens=1)
    p.drain()
    p.add("a", [2], max_tokens=1)
    p.drain()


def test_an_abort_frees_blocks_at_once():
    p = pipe()
    p.add("a", [1] * 12)
    p.add("b", [2] * 12)
    p.plan()
    assert p.scheduler.stats().num_used_kv_blocks == 6
    assert p.abort("a")
    assert not p.abort("a")
    assert p.scheduler.stats().num_used_kv_blocks == 3
    assert [output.request_id for output in p.commit()] == ["b"]
    assert p.plan().released == [0]
    assert p.abort("b")
    assert p.scheduler.has_work, "a result is still to come"
    assert not p.scheduler.has_requests
    assert p.commit() == []
    assert not p.scheduler.has_work


def test_an_aborted_request_leaves_the_queue():
    p = pipe(max_num_seqs=1)
    for name in "abc":
        p.add(name, [1] * 2, max_tokens=1)
    assert p.abort("b")
    assert p.scheduler.stats().num_waiting == 2
    p.drain()
    assert p.streams.keys() == {"a", "c"}
    assert not p.scheduler.abort("unknown")


def test_workers_forget_everybody_in_the_end():
    p = pipe(num_stages=2)
    for name in "abc":
        p.add(name, [1] * 5)
    p.drain()
    p.add("d", [1])
    p.drain()
    assert p.worker.known.keys() == {3}, "the last one goes with the next plan"


def finish(tokens: list[int], **sampling: object) -> list[FinishReason | None]:
    """Finish reasons after each of the tokens, whatever a worker should have masked."""
    scheduler = pipe().scheduler
    scheduler.add(Request("a", [1], SamplingParams(seed=0, **sampling)), 0.0)
    reasons = []
    for token in tokens:
        plan = scheduler.plan(0.0)
        assert plan is not None
        result = StepResult(plan.step_id, [token])
        reasons += [output.finish_reason for output in scheduler.commit(result, 0.0)]
    assert scheduler.has_work == (reasons[-1] is None)
    return reasons


def test_a_request_ends_by_length_or_by_a_stop_token():
    stop = {"max_tokens": 3, "stop_token_ids": (7, 8)}
    assert finish([5, 5, 5], **stop) == [None, None, FinishReason.LENGTH]
    assert finish([5, 8], **stop) == [None, FinishReason.STOP]
    assert finish([5, 5, 7], **stop) == [None, None, FinishReason.STOP]
    assert finish([7, 7, 7], min_tokens=2, **stop) == [None, None, FinishReason.STOP]
    assert finish([7], max_tokens=1) == [FinishReason.LENGTH]


def test_a_known_prefix_is_not_computed_again():
    p = pipe()
    p.add("first", [1, 2, 3, 4] * 2 + [5], max_tokens=1)
    p.drain()
    p.add("same", [1, 2, 3, 4] * 2 + [5], max_tokens=1)
    p.add("branch", [1, 2, 3, 4, 4, 3, 2, 1], max_tokens=1)
    p.add("other", [2, 2, 3, 4] * 2, max_tokens=1)
    plan = p.plan()
    assert chunks(plan) == [(1, 8, 1), (2, 4, 4), (3, 0, 8)]
    assert plan.chunks[0].block_ids[0] == plan.chunks[1].block_ids[0]
    assert [output.num_cached_tokens for output in p.commit()] == [8, 4, 0]
    stats = p.scheduler.stats()
    assert (stats.num_prefix_queries, stats.num_prefix_hits) == (34, 12)


def test_the_last_token_is_computed_even_if_its_block_is_known():
    p = pipe()
    for name in ("first", "second"):
        p.add(name, [1, 2, 3, 4] * 2, max_tokens=1)
        plan = p.plan()
        p.drain()
    assert chunks(plan) == [(1, 4, 4)]


def test_a_block_is_shared_from_the_next_plan_on():
    p = pipe(num_stages=2)
    p.add("a", [1] * 9)
    p.add("b", [1] * 9)
    assert chunks(p.plan()) == [(0, 0, 9), (1, 0, 9)]
    p.add("c", [1] * 9)
    assert chunks(p.plan()) == [(2, 8, 1)], "its blocks are written by the plan in flight"
    p.drain()


def test_without_the_cache_nothing_is_shared():
    p = pipe(enable_prefix_cache=False)
    for name in "ab":
        p.add(name, [1] * 9, max_tokens=1)
        plan = p.plan()
        p.drain()
    assert chunks(plan) == [(1, 0, 9)]
    assert p.scheduler.stats().num_cached_kv_blocks == 0


def test_prompt_logprobs_need_the_whole_prompt_but_fill_the_cache():
    p = pipe(max_num_batched_tokens=8)
    for name in "ab":
        p.add(name, [1] * 13, max_tokens=1, num_prompt_logprobs=0)
    p.drain()
    p.add("c", [1] * 13, max_tokens=1)
    assert chunks(p.plan()) == [(2, 12, 1)]
    p.drain()


def test_a_replay_takes_hits_and_changes_no_count():
    p = pipe(num_blocks=5, block_size=2)
    p.add("old", [1] * 3, max_tokens=7)
    p.add("young", [2] * 3, max_tokens=4)
    while not p.scheduler.stats().num_preemptions:
        step(p)
    p.drain()
    stats = p.scheduler.stats()
    assert (stats.num_prefix_queries, stats.num_prefix_hits) == (6, 0)


def test_after_a_loss_everybody_computes_again_what_he_has():
    p = pipe(num_stages=2)
    p.add("old", [1] * 8, max_tokens=9)
    step(p)
    p.add("young", [1] * 8 + [2] * 60, max_tokens=9)
    p.plan()
    p.plan()
    p.lose_everything()
    stats = p.scheduler.stats()
    assert (stats.num_waiting, stats.num_used_kv_blocks, stats.num_cached_kv_blocks) == (2, 0, 0)
    assert stats.num_in_flight == 0
    assert chunks(p.plan()) == [(2, 0, 9), (3, 0, 55)]
    p.drain()


def test_who_is_suspected_of_a_death_shares_a_step_with_no_other_suspect():
    p = pipe()
    for name in "abc":
        p.add(name, [1], max_tokens=9)
    step(p)
    plan = p.plan()
    suspects = plan.request_indexes[:2]
    assert p.scheduler.strike(suspects * 2) == [], "two workers that die at once are one death"
    p.lose_everything()
    assert chunks(p.plan()) == [(3, 0, 2)]
    p.commit()
    assert chunks(p.plan()) == [(3, 2, 1), (4, 0, 2), (5, 0, 2)]
    assert p.scheduler.strike([3]) == [], "a token has cleared it"
    [guilty] = p.scheduler.strike([4])
    p.lose_everything()
    assert guilty.request_id == "b"
    p.abort("b")
    p.drain()


def test_time_does_not_run_back():
    p = pipe()
    p.scheduler.plan(1.0)
    with pytest.raises(AssertionError, match=r"from 1\.0 to 0\.5"):
        p.scheduler.plan(0.5)


def test_results_come_in_order_and_whole():
    p = pipe(num_stages=2, max_num_batched_tokens=8)
    p.add("a", [1] * 12)
    p.plan()
    p.plan()
    with pytest.raises(AssertionError):
        p.scheduler.commit(StepResult(1, []), 0.0)
    with pytest.raises(AssertionError):
        p.scheduler.commit(StepResult(1, []), 0.0)


def test_the_order_is_the_policys():
    class LastComeFirstServed:
        keeps_budgets = False

        def key(self, request: Request) -> tuple[float, ...]:
            return (-request.arrival_time,)

        def victim_key(self, request: Request, now: float) -> tuple[float, ...]:
            return (-request.arrival_time,)

    config = SchedulerConfig(num_blocks=6, block_size=2, max_model_len=20, max_num_seqs=3)
    p = Pipe(Scheduler(config, policy=LastComeFirstServed()))
    for name in "abc":
        p.add(name, [1] * 2, max_tokens=8)
    p.plan()
    assert [p.scheduler._requests[name].request_index for name in "cba"] == [0, 1, 2]
    released: list[int] = []
    while not released:
        p.commit()
        released += p.plan().released
    assert released == [2], "the first to come steps back"
    p.drain()


class ContextIsDear:
    """Sixty-four for all tokens and their contexts; an empty step affords a token in any case."""

    def affordable_tokens(self, load: StepLoad, context: int, num_wanted: int) -> int:
        work = load.num_tokens * 8 + load.prefill_context + load.decode_context
        affordable = max((64 - work) // (8 + context), 0 if load.num_tokens else 1)
        return min(affordable, num_wanted)


def dear_pipe() -> Pipe:
    config = SchedulerConfig(num_blocks=9, max_model_len=140, max_num_seqs=3)
    return Pipe(Scheduler(config, cost=ContextIsDear()))


def test_what_a_step_affords_is_the_costs():
    p = dear_pipe()
    p.add("a", [1] * 16)
    parts = [chunks(step(p)) for _ in range(4)]
    assert parts == [[(0, 0, 8)], [(0, 8, 4)], [(0, 12, 3)], [(0, 15, 1)]]
    p.add("b", [2] * 16)
    assert chunks(step(p)) == [(0, 16, 1), (1, 0, 5)]
    assert chunks(step(p)) == [(0, 17, 1), (1, 5, 3)]
    p.drain()


def test_a_request_whose_cached_prefix_is_too_dear_is_not_admitted():
    p = dear_pipe()
    p.add("a", [1] * 72, max_tokens=1)
    p.drain()
    p.add("b", [2], max_tokens=2)
    p.add("same", [1] * 72, max_tokens=1)
    plan = step(p)
    assert (chunks(plan), len(plan.new_requests)) == ([(1, 0, 1)], 1)
    p.drain()
