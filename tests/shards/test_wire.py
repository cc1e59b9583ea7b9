"""Wires: whole messages in order, whatever their size; nobody waits; who is gone is noticed."""

import os
from collections.abc import Iterator
from threading import Thread

import pytest

from shardline_shards.wire import Wire, wire_pair

MORE_THAN_FITS = 1 << 23


@pytest.fixture
def pair() -> Iterator[tuple[Wire, Wire]]:
    ours, end = wire_pair()
    theirs = Wire(end)
    yield ours, theirs
    ours.close()
    theirs.close()


def wait_received(wire: Wire) -> bytes:
    while (message := wire.receive()) is None:
        pass
    return message


def test_messages_come_whole_and_in_order(pair: tuple[Wire, Wire]) -> None:
    ours, theirs = pair
    messages = [os.urandom(size) for size in (0, 1, 3, 4, 70_000, 5)]
    for message in messages:
        assert ours.send(message)
    assert [theirs.receive() for _ in messages] == messages
    assert theirs.receive() is None


def test_what_was_read_together_is_known_to_be_there(pair: tuple[Wire, Wire]) -> None:
    ours, theirs = pair
    assert not theirs.has_read_message
    ours.send(b"first")
    ours.send(b"")
    ours.send(b"third")
    assert theirs.receive() == b"first"
    assert theirs.has_read_message
    assert theirs.receive() == b""
    assert theirs.receive() == b"third"
    assert not theirs.has_read_message


def test_who_does_not_read_holds_up_nobody_and_gets_all_later(pair: tuple[Wire, Wire]) -> None:
    ours, theirs = pair
    big = os.urandom(MORE_THAN_FITS)
    assert not ours.send(big)  # returns, with a part of it unsent
    assert not ours.send(b"after it")
    reader = Thread(target=lambda: received.extend((wait_received(theirs), wait_received(theirs))))
    received: list[bytes] = []
    reader.start()
    ours.wait_sent()
    reader.join(60)
    assert received == [big, b"after it"]


def test_last_words_are_read_before_the_end_is_noticed(pair: tuple[Wire, Wire]) -> None:
    ours, theirs = pair
    theirs.send(b"last words")
    theirs.close()
    assert ours.receive() == b"last words"
    with pytest.raises(EOFError):
        ours.receive()


def test_half_a_message_of_one_who_is_gone_is_none() -> None:
    ours, theirs = wire_pair()
    theirs.send((100).to_bytes(4, "little") + b"only a part")
    assert ours.receive() is None
    theirs.close()
    with pytest.raises(EOFError):
        ours.receive()
    ours.close()


def test_what_is_sent_to_one_who_is_gone_is_lost_without_an_error(pair: tuple[Wire, Wire]) -> None:
    ours, theirs = pair
    theirs.close()
    assert ours.send(b"hello?")
    ours.wait_sent()
