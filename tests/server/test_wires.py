"""The engine's ends of the wires: by name, waiting for nobody, closed when the other is gone."""

import select
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from shardline_server.wires import Wires
from shardline_shards.messages import Dropped, FromWorker, decode_from_worker, encode
from shardline_shards.wire import Wire, wire_pair

MORE_THAN_FITS = 1 << 23
SAYS_SOMETHING = Dropped("tensor", 1)


Others = dict[bytes, Wire]


@pytest.fixture
def wires() -> Iterator[Wires[FromWorker]]:
    wires = Wires(decode_from_worker)
    yield wires
    wires.close()


@pytest.fixture
def others(wires: Wires[FromWorker]) -> Iterator[Others]:
    """The other ends of three wires."""
    with ExitStack() as stack:
        ends = {}
        for name in (b"first", b"second", b"third"):
            ours, theirs = wire_pair()
            wires.add(name, ours)
            ends[name] = Wire(theirs)
            stack.callback(ends[name].close)
        yield ends


def is_readable(wires: Wires[FromWorker]) -> bool:
    return bool(select.select([wires], [], [], 0)[0])


def test_each_hears_what_is_meant_for_it_and_is_heard_under_its_name(
    wires: Wires[FromWorker], others: Others
) -> None:
    first, second = others[b"first"], others[b"second"]
    assert wires.send(b"second", b"to the second")
    assert (first.receive(), second.receive()) == (None, b"to the second")
    assert not is_readable(wires)
    second.send(encode(SAYS_SOMETHING))
    assert is_readable(wires)
    assert wires.receive() == (b"second", SAYS_SOMETHING)
    assert wires.receive() is None
    assert not is_readable(wires)


def test_a_name_that_is_on_no_wire_is_told(wires: Wires[FromWorker]) -> None:
    assert not wires.send(b"on another node", b"hello")


def test_who_does_not_read_holds_up_nobody_and_gets_all_later(
    wires: Wires[FromWorker], others: Others
) -> None:
    slow, quick = others[b"first"], others[b"second"]
    assert wires.send(b"first", b"x" * MORE_THAN_FITS)
    assert wires.send(b"second", b"at once")
    assert quick.receive() == b"at once"
    message = None
    while message is None:
        message = slow.receive()
        assert wires.receive() is None  # passes on what there is room for now
    assert message == b"x" * MORE_THAN_FITS
    assert not is_readable(wires)


def test_an_end_that_is_gone_is_heard_out_and_then_forgotten(
    wires: Wires[FromWorker], others: Others
) -> None:
    leaver = others[b"first"]
    leaver.send(encode(SAYS_SOMETHING))
    leaver.close()
    assert wires.receive() == (b"first", SAYS_SOMETHING)
    assert wires.receive() is None
    assert not is_readable(wires)  # else the engine would never sleep again
    assert not wires.send(b"first", b"hello?")


def test_what_cannot_be_read_is_dropped_and_counted(
    wires: Wires[FromWorker], others: Others
) -> None:
    odd = others[b"first"]
    odd.send(b"\xc1")
    odd.send(encode(SAYS_SOMETHING))
    assert wires.receive() == (b"first", SAYS_SOMETHING)
    assert wires.num_dropped == 1


def test_closing_leaves_all() -> None:
    wires = Wires(decode_from_worker)
    ours, theirs = wire_pair()
    wires.add(b"one", ours)
    wires.close()
    assert theirs.recv(1) == b""
    theirs.close()
