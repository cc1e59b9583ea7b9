"""Channels between our own processes: closed to strangers, and to bytes that are no message."""

import signal
import socket
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest
from tests.strangers import (
    RAW_BYTES,
    WAIT_MS,
    WRONG_KEYS,
    dealer,
    knock,
    wait_for_drops,
    wait_until_turned_away,
)
from torch.distributed import HashStore

from shardline_server.child import ChildExits
from shardline_server.errors import ConfigError
from shardline_server.launcher_store import LauncherStore
from shardline_server.local_workers import WorkerState
from shardline_server.messages import Hello, ToEngine
from shardline_server.node_watch import Beat, HeadWatch, NodeWatch
from shardline_server.rendezvous import Assignment, Job, NoteBoard
from shardline_server.wires import Wires
from shardline_server.workforce import Workforce
from shardline_shards.channel import Endpoint
from shardline_shards.gate import Gate, LaunchKeys, Listener
from shardline_shards.layout import Place
from shardline_shards.ledger import Ledger, Operation
from shardline_shards.messages import decode_from_worker

HELLO = msgspec.msgpack.encode(Hello())
NODE = "1 (there, 127.0.0.1)"


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate(LaunchKeys.create())
    yield gate
    gate.close()


@pytest.fixture
def listener(gate: Gate) -> Iterator[Listener[ToEngine]]:
    listener = Listener(gate, "127.0.0.1", msgspec.msgpack.Decoder(ToEngine).decode)
    yield listener
    listener.close(linger_ms=0)


def check_right_keys_come_in(listener: Listener[ToEngine], name: bytes) -> None:
    with dealer(listener.endpoint.address, listener.endpoint.keys, name) as peer:
        peer.send(HELLO)
        assert listener.socket.poll(WAIT_MS)
        assert listener.receive() == (name, Hello())
        listener.send(name, b"for peers")
        assert peer.poll(WAIT_MS)
        assert peer.recv() == b"for peers"


@pytest.mark.parametrize("kind", WRONG_KEYS)
def test_a_stranger_neither_speaks_nor_listens(listener: Listener[ToEngine], kind: str) -> None:
    address, keys = listener.endpoint.address, listener.endpoint.keys
    with dealer(address, WRONG_KEYS[kind](keys), b"0.0") as stranger:
        stranger.send(HELLO)
        wait_until_turned_away(stranger)
        listener.send(b"0.0", b"for peers")
        wait_for_drops(listener, 1)
        assert listener.receive() is None
        assert not stranger.poll(0)
        check_right_keys_come_in(listener, b"0.0")


def test_bytes_that_strangers_send_are_counted_and_harm_nobody(
    listener: Listener[ToEngine],
) -> None:
    for payload in RAW_BYTES.values():
        knock(listener.endpoint.address, payload)
    wait_for_drops(listener, len(RAW_BYTES))
    check_right_keys_come_in(listener, b"a peer")
    assert listener.num_dropped == len(RAW_BYTES)


def test_peers_that_come_and_go_beside_a_stranger_are_not_counted(
    listener: Listener[ToEngine],
) -> None:
    host, port = listener.endpoint.address.removeprefix("tcp://").split(":")
    with socket.create_connection((host, int(port))):  # says nothing all the while
        for number in range(3):
            check_right_keys_come_in(listener, b"%d" % number)
    knock(listener.endpoint.address, b"")
    wait_for_drops(listener, 2)
    check_right_keys_come_in(listener, b"last")
    assert listener.num_dropped == 2


@pytest.mark.parametrize("frames", [[b"\xc1"], [], [HELLO, HELLO], [b"\x91" * 5000], [b""]])
def test_what_a_peer_sends_that_is_no_message_is_dropped_and_counted(
    listener: Listener[ToEngine], frames: list[bytes]
) -> None:
    with dealer(listener.endpoint.address, listener.endpoint.keys, b"peer") as peer:
        peer.send_multipart(frames or [b""])
        peer.send(HELLO)
        assert listener.socket.poll(WAIT_MS)
        while (received := listener.receive()) is None:
            assert listener.socket.poll(WAIT_MS)
        assert received == (b"peer", Hello())
        assert listener.num_dropped == 1


@pytest.fixture
def exits() -> Iterator[ChildExits]:
    exits = ChildExits()
    yield exits
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    for end in (exits._reader, exits._writer):
        end.close()


def test_head_and_node_drop_what_they_cannot_read_and_the_head_counts_both(
    gate: Gate, exits: ChildExits
) -> None:
    head = NodeWatch(gate, "127.0.0.1")
    head.expect([NODE])
    node = HeadWatch(head.endpoint, NODE)

    def beat_until(is_so: Callable[[], bool]) -> None:
        while not is_so():
            node.beat([], exits, told_to_leave=False)
            assert head.find_failure() is None

    with dealer(head.endpoint.address, head.endpoint.keys, b"\xff of no name") as peer:
        peer.send(b"\xc1")
        beat_until(lambda: head.num_dropped == 1 and NODE in head._dropped_by)
    head._listener.send(NODE.encode(), b"\xc1")
    beat_until(lambda: head.num_dropped == 2)
    head.dismiss()
    while not node.answer.leave:
        node.beat([], exits, told_to_leave=False)
    node.close()


def test_notes_show_no_key_and_open_with_the_secret_and_in_their_place_alone() -> None:
    store, keys = LauncherStore(HashStore()), LaunchKeys.create().client
    note = Assignment(watch=Endpoint(address="tcp://127.0.0.1:9", keys=keys))
    NoteBoard(store, "a secret").put("assignment/1", note)
    content = store.get("assignment/1")
    for shown in (keys.server_public, keys.public, keys.secret, "tcp://127"):
        assert shown.encode() not in content
    assert take(store, "a secret", "assignment/1") == note
    store.set("assignment/2", content)
    for number, cut in enumerate((0, 11, 12, 30, len(content) - 1)):
        store.set(f"cut/{number}", content[:cut])
    refused = [("another", "assignment/1"), ("a secret", "assignment/2")]
    for secret, key in refused + [("a secret", f"cut/{number}") for number in range(5)]:
        with pytest.raises(ConfigError, match="the secrets of head and node differ"):
            take(store, secret, key)


def test_a_note_of_another_version_is_named() -> None:
    store = LauncherStore(HashStore())
    NoteBoard(store, "a secret").put("job", Beat())
    with pytest.raises(ConfigError, match="another version of Shardline wrote the note job"):
        NoteBoard(store, "a secret").take("job", Job, time.monotonic(), lambda: "none")


def take(store: LauncherStore, secret: str, key: str) -> Assignment:
    return NoteBoard(store, secret).take(key, Assignment, time.monotonic(), lambda: "none")


def test_keys_show_in_no_text() -> None:
    keys = LaunchKeys.create()
    text = f"{keys} {keys!r} {[keys.client]} {Endpoint(address='', keys=keys.client)}"
    for secret in (keys.server_secret, *msgspec.structs.astuple(keys.client)):
        assert secret not in text


def state(tp_rank: int, ledger: Ledger) -> WorkerState:
    return WorkerState(Place(1, tp_rank), 0, None, False, ledger.read(), ledger.lately_done())


def test_a_worker_of_another_node_that_does_something_else_is_named(
    gate: Gate, exits: ChildExits
) -> None:
    head = NodeWatch(gate, "127.0.0.1")
    head.expect([NODE])
    node = HeadWatch(head.endpoint, NODE)
    workforce = Workforce(head, Wires(decode_from_worker))
    ledgers = [Ledger.create() for _ in range(3)]

    def tell() -> dict[Place, str]:
        node.beat(
            [state(i, ledger) for i, ledger in enumerate(ledgers)], exits, told_to_leave=False
        )
        assert head.find_failure() is None
        return workforce.find_divergence()

    for step in range(300):
        for rank, ledger in enumerate(ledgers):
            ledger.begin(step, 7, 5)
            ledger.note(Operation.ALL_REDUCE, (5, 99 if (step, rank) == (280, 2) else 36))
            ledger.finish()
        if step % 100 == 50:
            assert not tell()
    odd = tell()
    assert odd == {Place(1, 2): "did other operations in step 280 than its stage"}
    assert not tell(), "what has been told once is not told again"
    for ledger in ledgers:
        ledger.close()
    head.dismiss()
    node.close()
