"""Tensors as messages: from peers of this generation, and from nobody else."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from shardline_shards import mesh
from shardline_shards.errors import LostPeer
from shardline_shards.gate import Gate, LaunchKeys
from shardline_shards.layout import Place
from shardline_shards.mesh import Mesh
from tests.strangers import RAW_BYTES, WRONG_KEYS, dealer, knock, wait_until_turned_away

HOST = "127.0.0.1"
FIRST, SECOND = Place(0, 0), Place(1, 0)
TENSOR = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate(LaunchKeys.among_clients(LaunchKeys.create().client))
    yield gate
    gate.close()


@pytest.fixture
def pair(gate: Gate) -> Iterator[tuple[Mesh, Mesh]]:
    first, second = Mesh(gate, HOST, FIRST, 3), Mesh(gate, HOST, SECOND, 3)
    together(
        lambda: first.meet({SECOND: second.address}), lambda: second.meet({FIRST: first.address})
    )
    yield first, second
    for end in (first, second):
        if not end._listener.socket.closed:
            end.close()


def together(*calls: Callable[[], None]) -> None:
    with ThreadPoolExecutor() as threads:
        for future in [threads.submit(call) for call in calls]:
            future.result()


def room() -> torch.Tensor:
    return torch.empty_like(TENSOR)


def check_that_tensors_come(pair: tuple[Mesh, Mesh]) -> None:
    first, second = pair
    first.send(SECOND, TENSOR)
    first.send(SECOND, TENSOR + 1)
    second.send(FIRST, TENSOR + 2)
    assert torch.equal(second.receive(FIRST, room()), TENSOR)
    assert torch.equal(second.receive(FIRST, room()), TENSOR + 1)
    assert torch.equal(first.receive(SECOND, room()), TENSOR + 2)


def wait_for_drops(end: Mesh, count: int) -> None:
    """Until so many are counted, else the test's time limit."""
    while end.num_dropped < count:
        end.connections.poll(10)


def test_tensors_come_in_the_order_in_which_they_were_sent(pair: tuple[Mesh, Mesh]) -> None:
    check_that_tensors_come(pair)
    assert [end.num_dropped for end in pair] == [0, 0]


def test_bytes_of_strangers_are_dropped_and_counted(pair: tuple[Mesh, Mesh]) -> None:
    for payload in RAW_BYTES.values():
        knock(pair[1].address, payload)
    wait_for_drops(pair[1], len(RAW_BYTES))
    check_that_tensors_come(pair)
    assert [end.num_dropped for end in pair] == [0, len(RAW_BYTES)]


@pytest.mark.parametrize("kind", WRONG_KEYS)
def test_who_has_other_keys_is_not_heard(gate: Gate, pair: tuple[Mesh, Mesh], kind: str) -> None:
    with dealer(pair[1].address, WRONG_KEYS[kind](gate.keys.client), b"0.0.3") as stranger:
        stranger.send(bytes(12))
        wait_until_turned_away(stranger)
        wait_for_drops(pair[1], 1)
        check_that_tensors_come(pair)


@pytest.mark.parametrize("name", [b"0.0.2", b"1.0.3", b"\xff", b"0.1.3"])
def test_who_is_no_peer_of_this_generation_is_dropped_and_counted(
    gate: Gate, pair: tuple[Mesh, Mesh], name: bytes
) -> None:
    first, second = pair
    with dealer(second.address, gate.keys.client, name) as late:
        late.send(bytes(12))
        while not second.num_dropped:
            first.send(SECOND, TENSOR)
            assert torch.equal(second.receive(FIRST, room()), TENSOR)
    check_that_tensors_come(pair)
    assert second.num_dropped == 1


def test_a_tensor_of_another_size_ends_the_generation(pair: tuple[Mesh, Mesh]) -> None:
    first, second = pair
    first.send(SECOND, TENSOR[:1])
    with pytest.raises(LostPeer, match="stage 0, tp rank 0 sent 6 bytes where 12 are due"):
        second.receive(FIRST, room())


def test_a_peer_that_has_gone_is_named_by_who_waits_for_it_and_by_who_sends_to_it(
    pair: tuple[Mesh, Mesh],
) -> None:
    first, second = pair
    first.close()
    with pytest.raises(LostPeer, match="the connection to stage 0, tp rank 0 broke"):
        second.receive(FIRST, room())
    with pytest.raises(LostPeer, match="the connection to stage 0, tp rank 0 broke"):
        second.send(FIRST, TENSOR)


def test_who_leaves_in_good_order_has_sent_everything(pair: tuple[Mesh, Mesh]) -> None:
    first, second = pair
    large = torch.ones(1 << 22)

    def send_and_leave() -> None:
        first.send(SECOND, large)
        first.part()
        first.close(linger_ms=1000)

    def receive_and_leave() -> None:
        assert torch.equal(second.receive(FIRST, torch.empty_like(large)), large)
        second.part()

    together(send_and_leave, receive_and_leave)


def test_nobody_is_awaited_for_ever(
    pair: tuple[Mesh, Mesh], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mesh, "_STEP_LIMIT_S", 0.1)
    with pytest.raises(LostPeer, match="nothing has come from stage 0, tp rank 0 for 0 s"):
        pair[1].receive(FIRST, room())


def test_generations_follow_each_other_as_fast_as_they_like(gate: Gate) -> None:
    for generation in range(200):
        Mesh(gate, HOST, FIRST, generation).close()
