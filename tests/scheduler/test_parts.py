"""The parts on their own: block pool, prefix digests, waiting queue, configuration."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardline_scheduler import (
    POLICIES,
    Fcfs,
    Request,
    RequestState,
    SchedulerConfig,
    StepLoad,
    TokenBudget,
)
from shardline_scheduler.blocks import BlockPool
from shardline_scheduler.plan import SamplingParams
from shardline_scheduler.prefix_cache import ROOT_DIGEST, block_digest
from shardline_scheduler.queue import WaitingQueue
from shardline_scheduler.running import RunningRequests


def known_pool() -> tuple[BlockPool, list[int]]:
    """Six blocks; four of them belong to a request and are known to the cache."""
    pool = BlockPool(6)
    table = pool.allocate(4)
    for block_id in table:
        pool.cache.insert(bytes([block_id]), block_id)
    return pool, table


def test_blocks_are_free_cached_or_used():
    pool, table = known_pool()
    pool.allocate(1)
    assert (pool.num_used, pool.num_cached, pool.num_available) == (5, 0, 1)
    pool.free(table)
    assert (pool.num_used, pool.num_cached, pool.num_available) == (1, 4, 5)


def test_a_shared_block_lives_until_its_last_user_leaves():
    pool, table = known_pool()
    pool.share(table[:2])
    pool.free(table)
    assert [pool.is_used(block_id) for block_id in table] == [True, True, False, False]
    pool.check([table[:2]])
    pool.free(table[:2])
    pool.check([])
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(table[:1])


def test_eviction_takes_the_worthless_then_the_least_recently_used_tail_first():
    pool, table = known_pool()
    first, second = table[:2], table[2:]
    pool.free(first)
    pool.free(second)
    assert set(pool.allocate(2)).isdisjoint(table)
    assert pool.allocate(3) == [first[1], first[0], second[1]]
    assert [pool.cache.find(bytes([block_id])) for block_id in table] == [
        None,
        None,
        second[0],
        None,
    ]


def test_a_hit_makes_a_block_recently_used():
    pool, table = known_pool()
    for block_id in table:
        pool.free([block_id])
    pool.share(table[:1])
    pool.free(table[:1])
    pool.allocate(2)
    assert pool.allocate(4) == [*table[1:], table[0]]


def test_a_million_blocks_are_no_more_work_than_ten():
    pool = BlockPool(1_000_000)
    table = pool.allocate(1_000_000)
    for block_id in table:
        pool.cache.insert(block_id.to_bytes(4), block_id)
    pool.free(table)
    for _ in range(100_000):  # Linear work here would take hours.
        pool.free(pool.allocate(1))
    assert pool.num_available == 1_000_000


def test_check_finds_a_leak():
    pool, table = known_pool()
    with pytest.raises(AssertionError, match=r"2 free \+ 0 cached \+ 3 used != 6 blocks"):
        pool.check([table[:3]])
    with pytest.raises(AssertionError, match="1 references, 2 tables name it"):
        pool.check([table, table[:1]])


@given(st.lists(st.lists(st.integers(0, 2**40), min_size=2, max_size=2), unique_by=tuple))
def test_digests_tell_prefixes_apart(blocks: list[list[int]]):
    digests = {ROOT_DIGEST}
    for block in blocks:
        digests |= {block_digest(parent, block) for parent in list(digests)[:4]}
    again = {block_digest(ROOT_DIGEST, block) for block in blocks}
    assert again <= digests
    assert len(again) == len(blocks)


def request(name: str, arrival_time: float, sequence: int) -> Request:
    made = Request(name, [1], SamplingParams(max_tokens=1, seed=0))
    made.arrival_time, made.sequence = arrival_time, sequence
    return made


def test_the_queue_is_in_order_of_arrival():
    queue = WaitingQueue(Fcfs())
    for sequence, (name, arrival) in enumerate([("b", 2.0), ("c", 2.0), ("a", 1.0)]):
        queue.push(request(name, arrival, sequence))
    assert [queue.pop().request_id for _ in range(len(queue))] == ["a", "b", "c"]


def test_a_queue_that_stands_still_does_not_collect_dropped_requests():
    queue = WaitingQueue(Fcfs())
    for i in range(1000):
        dropped = request(str(i), float(i), i)
        queue.push(dropped)
        if i % 100:
            dropped.state = RequestState.FINISHED
            queue.drop(dropped)
        assert len(queue) == i // 100 + 1
        assert len(queue._heap) <= 2 * len(queue) + 1
    assert [queue.pop().request_id for _ in range(len(queue))] == [str(100 * i) for i in range(10)]


def test_decodes_that_are_put_back_keep_their_turn():
    running = RunningRequests()
    requests = [request(str(i), 0.0, i) for i in range(4)]
    for made in requests:
        made.start(made.sequence, 0)
        running.add(made)
        running.end_prefill(made)
    running.take_tokens(requests)
    first_three = running.pop_decodes(3, guest=True)
    assert first_three == requests[:3]
    running.put_back(first_three, guest=True)
    running.remove(requests[1])
    assert running.pop_decodes(2, guest=True) == [requests[0], requests[2]]
    assert running.pop_decodes(4, guest=True) == requests[3:]


def test_the_load_of_a_step_tells_decodes_from_chunks():
    load = StepLoad()
    load.add(num_tokens=1, context=0)
    load.add(num_tokens=1, context=7)
    load.add(num_tokens=3, context=5)
    assert load == StepLoad(
        num_prefill_tokens=4, num_decodes=1, decode_context=7, prefill_context=18
    )
    assert load.num_tokens == 5
    assert TokenBudget(8).affordable_tokens(load, context=0, num_wanted=9) == 3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_blocks": 0}, "num_blocks is 0, must be at least 1"),
        ({"max_in_flight": 0}, "in_flight_limit is 0"),
        ({"max_num_seqs": 9, "max_num_batched_tokens": 8}, "8 is below max_num_seqs 9"),
        ({"policy": "luck"}, r"'luck' is unknown; one of \['edf', 'fcfs'\]"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(wrong: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        SchedulerConfig(**{"num_blocks": 8, "max_model_len": 64} | wrong)  # type: ignore[arg-type]


def test_the_registry_is_the_only_switch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(POLICIES, "mine", Fcfs)
    assert SchedulerConfig(num_blocks=8, max_model_len=64, policy="mine").policy == "mine"


def test_steps_in_flight_follow_the_stages():
    config = SchedulerConfig(num_blocks=8, max_model_len=64, num_stages=3)
    assert config.in_flight_limit == 3
    assert config.max_request_tokens == 64
