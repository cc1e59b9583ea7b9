"""The board that a head keeps: who comes to it, who is kept out, and what either side is told."""

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from threading import Thread

import msgspec
import psutil
import pytest
from tests.strangers import RAW_BYTES, WAIT_MS, WRONG_KEYS, dealer, knock, wait_until_turned_away

from shardline_server.board_client import BoardClient
from shardline_server.board_keeper import BoardKeeper
from shardline_server.engine_config import BoardAddress
from shardline_server.errors import ConfigError
from shardline_server.node_watch import Beat
from shardline_server.rendezvous import Assignment, NoteBoard, derive_keys, find_board, keep_board
from shardline_shards.gate import Gate, Listener

SECRET = "a secret of the tests"
OTHER_SECRET = "the secrets of head and node differ; give both the same one"
NOTE = Assignment(refusal="no room")


@pytest.fixture
def address() -> BoardAddress:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return BoardAddress(host="127.0.0.1", port=free.getsockname()[1])


@pytest.fixture
def keeper(address: BoardAddress) -> Iterator[BoardKeeper]:
    with closing(keep_board(address, SECRET)) as keeper:
        yield keeper


def soon() -> float:
    return time.monotonic() + WAIT_MS / 1000


def find(address: BoardAddress) -> NoteBoard:
    return find_board(address, SECRET, soon())


def take(board: NoteBoard) -> Assignment:
    return board.take("assignment/1", Assignment, soon(), lambda: "it does not come")


def wait_for_drops(keeper: BoardKeeper, count: int) -> None:
    """Until so many have been counted, else the test's time limit."""
    while keeper.num_dropped < count:
        time.sleep(0.01)


def begin(what: Callable[[], object]) -> Thread:
    thread = Thread(target=what, daemon=True)
    thread.start()
    return thread


def test_strangers_neither_read_nor_write_nor_hold_up_who_joins(
    address: BoardAddress, keeper: BoardKeeper
) -> None:
    where, keys = keeper.endpoint.address, keeper.endpoint.keys
    with closing(find(address)) as head, closing(find(address)) as node:
        for payload in RAW_BYTES.values():
            knock(where, payload)
        assert node.draw_number() == 1
        for kind in WRONG_KEYS.values():
            with dealer(where, kind(keys), b"a node") as stranger:
                stranger.send(b"spoilt")
                wait_until_turned_away(stranger)
        with socket.create_connection((address.host, address.port)):  # says nothing all the while
            head.put("assignment/1", NOTE)
            assert take(node) == NOTE
        assert node.draw_number() == 2
        wait_for_drops(keeper, len(RAW_BYTES) + len(WRONG_KEYS) + 1)


def test_what_a_node_sends_that_is_no_message_is_counted_and_harms_nobody(
    address: BoardAddress, keeper: BoardKeeper
) -> None:
    endpoint = keeper.endpoint
    with dealer(endpoint.address, endpoint.keys, b"a node") as peer, closing(find(address)) as node:
        for frames in ([b"\xc1"], [b""], [b"\x91" * 5000], [b"two", b"frames"]):
            peer.send_multipart(frames)
        wait_for_drops(keeper, 4)
        assert node.draw_number() == 1


def test_a_note_is_read_before_and_after_it_is_written(
    address: BoardAddress, keeper: BoardKeeper
) -> None:
    with closing(find(address)) as head, closing(find(address)) as node:
        assert not node._store.is_there("assignment/1", 0.0)
        head.put("assignment/1", NOTE)
        assert take(node) == NOTE
        assert take(node) == NOTE
        with pytest.raises(ConfigError, match="it does not come"):
            node.take("assignment/2", Assignment, time.monotonic(), lambda: "it does not come")


def test_a_node_that_dies_as_it_waits_is_nobodys_loss(
    address: BoardAddress, keeper: BoardKeeper
) -> None:
    with closing(find(address)) as head, closing(find(address)) as node:
        with closing(find(address)) as dying:
            assert not dying._store.is_there("assignment/1", 0.0)
        head.put("assignment/1", NOTE)
        assert take(node) == NOTE
        assert keeper.num_dropped == 0


def test_nodes_may_come_before_their_head(address: BoardAddress) -> None:
    numbers: list[int] = []

    def join() -> None:
        with closing(find(address)) as node:
            numbers.append(node.draw_number())

    nodes = [begin(join) for _ in range(3)]
    with closing(keep_board(address, SECRET)):
        for node in nodes:
            node.join()
    assert sorted(numbers) == [1, 2, 3]


def test_another_secret_is_told_long_before_the_deadline(
    address: BoardAddress, keeper: BoardKeeper
) -> None:
    with pytest.raises(ConfigError, match=OTHER_SECRET):
        find_board(address, "another", time.monotonic() + 3600)
    half_right = WRONG_KEYS["the server's key and an own pair"](keeper.endpoint.keys)
    assert half_right is not None
    with pytest.raises(ConfigError, match=OTHER_SECRET):
        BoardClient(address, half_right, time.monotonic() + 3600)
    wait_for_drops(keeper, 3)


def test_a_head_that_is_not_there_is_told_with_the_reason(address: BoardAddress) -> None:
    with pytest.raises(ConfigError, match=rf"no head answers at {address} \(.*refused\)"):
        find_board(address, SECRET, time.monotonic())
    nowhere = BoardAddress(host="nowhere.invalid", port=address.port)
    with pytest.raises(ConfigError, match=r"no head answers at nowhere.invalid:\d+ \(.*not known"):
        find_board(nowhere, SECRET, time.monotonic())


def test_who_listens_and_says_nothing_is_no_head_of_another_secret(address: BoardAddress) -> None:
    with (
        socket.create_server((address.host, address.port)),
        pytest.raises(ConfigError, match=r"no head answers at .* \(what listens there is none\)"),
    ):
        find_board(address, SECRET, time.monotonic() + 0.3)


def test_a_head_that_goes_is_told_to_who_waits(address: BoardAddress) -> None:
    keeper = keep_board(address, SECRET)
    with closing(find(address)) as node:
        begin(keeper.close)
        with pytest.raises(ConfigError, match="the head has gone"):
            take(node)
        with pytest.raises(ConfigError, match="the head has gone"):
            node.draw_number()


def test_what_was_written_last_is_read_though_the_head_goes(address: BoardAddress) -> None:
    with closing(find_late(address)) as node:
        assert take(node) == NOTE


def find_late(address: BoardAddress) -> NoteBoard:
    """A node that looks for a note that has come meanwhile, and whose head has left after that."""
    keeper = keep_board(address, SECRET)
    node = find(address)
    assert not node._store.is_there("assignment/1", 0.0)
    with closing(find(address)) as head:
        head.put("assignment/1", NOTE)
    keeper.close()
    return node


def test_a_head_of_another_version_is_told(address: BoardAddress) -> None:
    with closing(Gate(derive_keys(SECRET))) as gate:
        listener = Listener(gate, address.host, bytes, address.port)
        with closing(find(address)) as node:
            node._store._send(Beat())  # type: ignore[attr-defined]
            assert listener.socket.poll(WAIT_MS)
            received = listener.receive()
            assert received is not None
            listener.send(received[0], msgspec.msgpack.encode(Beat()))
            with pytest.raises(ConfigError, match="another version of Shardline keeps the board"):
                take(node)
        listener.close(linger_ms=0)


def test_one_launch_after_the_other_takes_the_same_port(address: BoardAddress) -> None:
    for _ in range(3):
        with closing(keep_board(address, SECRET)), closing(find(address)) as node:
            assert node.draw_number() == 1
    with socket.create_server((address.host, address.port)):
        pass


def test_a_taken_port_and_an_address_of_another_node_are_told(
    address: BoardAddress, keeper: BoardKeeper
) -> None:
    in_use = f"--rendezvous {address} cannot be opened: Address already in use$"
    with pytest.raises(ConfigError, match=in_use):
        keep_board(address, SECRET)
    elsewhere = BoardAddress(host="192.0.2.1", port=address.port)
    with pytest.raises(ConfigError, match=r"cannot be opened: Cannot assign requested address$"):
        keep_board(elsewhere, SECRET)


def test_it_listens_at_its_address_and_no_other(address: BoardAddress, keeper: BoardKeeper) -> None:
    found = [
        one.laddr
        for one in psutil.Process().net_connections("tcp")
        if one.status == psutil.CONN_LISTEN and one.laddr.port == address.port
    ]
    assert found == [(address.host, address.port)]


def test_keys_follow_from_the_secret_and_show_in_no_text(keeper: BoardKeeper) -> None:
    keys = derive_keys(SECRET)
    assert keys.client == keeper.endpoint.keys
    secrets = {keys.server_secret, *msgspec.structs.astuple(keys.client)}
    assert len(secrets) == 4, "the two pairs have nothing in common"
    assert not any(secret in f"{keys} {keeper.endpoint}" for secret in secrets)
