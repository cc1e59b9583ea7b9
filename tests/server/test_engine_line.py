"""A front end and its engine over either line: the same, but for threads and encryption between."""

import asyncio
import select
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import msgspec
import pytest
from tests.server.peer import STATS

from shardline_scheduler.plan import SamplingParams
from shardline_server.engine_line import EngineLine, open_line
from shardline_server.frontend_channel import PARENT, FrontendChannel
from shardline_server.messages import Abort, EngineFailed, FromEngine, Hello, Output, Submit
from shardline_shards.channel import Endpoint
from shardline_shards.gate import Gate, LaunchKeys
from shardline_shards.wire import Wire

MORE_THAN_FITS = 4_000_000
SAMPLING = SamplingParams(max_tokens=1, seed=0)


@dataclass
class Engine:
    """The engine's end, and what a front end needs to reach it in either way."""

    channel: FrontendChannel
    gate: Gate
    wire: Wire
    has_left: bool = False

    def open(self, kind: str, on_readable: Callable[[], None]) -> EngineLine:
        endpoint = Endpoint(address=self.channel.address, keys=self.gate.keys.client)
        return open_line(self.wire if kind == "wire" else endpoint, on_readable)

    def leave(self) -> None:
        if not self.has_left:
            self.channel.close()
        self.has_left = True

    async def receive(self) -> tuple[bytes, object]:
        while (received := self.channel.receive()) is None:
            await asyncio.sleep(0.001)
        return received


@pytest.fixture
def engine() -> Iterator[Engine]:
    ours, theirs = socket.socketpair()
    gate, wire = Gate(LaunchKeys.create()), Wire(ours)
    channel = FrontendChannel(gate, "127.0.0.1", theirs.detach())
    with closing(wire):
        engine = Engine(channel, gate, wire)
        yield engine
        engine.leave()
        gate.close()


def submit(number: int, num_tokens: int) -> Submit:
    return Submit(str(number), [70_000] * num_tokens, SAMPLING)


def ignore() -> None:
    pass


@pytest.mark.parametrize("kind", ["wire", "zmq"])
def test_both_ways(engine: Engine, kind: str) -> None:
    async def talk() -> None:
        heard, news = [], asyncio.Event()

        def read() -> None:
            while (frames := line.receive()) is not None:
                heard.extend(frames)
                news.set()

        line = engine.open(kind, read)
        line.send(msgspec.msgpack.encode(Hello()))
        frontend, message = await engine.receive()
        assert message == Hello()
        assert (frontend == PARENT) is (kind == "wire")
        for _ in range(2):
            news.clear()
            engine.channel.send(frontend, Output([], STATS))
            await asyncio.wait_for(news.wait(), 10)
        assert heard == [msgspec.msgpack.encode(Output([], STATS))] * 2
        line.close()
        line.close()
        assert line.receive() is None

    asyncio.run(talk())


@pytest.mark.parametrize("kind", ["wire", "zmq"])
def test_who_sends_does_not_wait_for_an_engine_that_does_not_read(
    engine: Engine, kind: str
) -> None:
    async def talk() -> None:
        line = engine.open(kind, ignore)
        sent = [submit(number, num_tokens=MORE_THAN_FITS // 40) for number in range(10)]
        for message in sent:
            line.send(msgspec.msgpack.encode(message))
        received = [(await engine.receive())[1] for _ in sent]
        assert received == sent
        line.close()

    asyncio.run(talk())


def test_what_has_come_together_is_received_piece_by_piece(engine: Engine) -> None:
    aborts = [Abort(str(number)) for number in range(20)]
    assert not engine.channel.has_message
    for abort in aborts:
        engine.wire.send(msgspec.msgpack.encode(abort))
    assert engine.channel.has_message
    assert engine.channel.receive() == (PARENT, aborts[0])
    descriptor = engine.channel.sources[0]
    assert not select.select([descriptor], [], [], 0)[0]
    assert engine.channel.has_unread and engine.channel.has_message
    assert [engine.channel.receive() for _ in aborts[1:]] == [
        (PARENT, abort) for abort in aborts[1:]
    ]
    assert engine.channel.receive() is None
    assert not engine.channel.has_unread and not engine.channel.has_message


def test_a_line_to_an_engine_that_is_gone_is_closed_and_wakes_nobody(engine: Engine) -> None:
    async def talk() -> None:
        num_turns = 0

        def read() -> None:
            nonlocal num_turns
            num_turns += 1
            assert line.receive() is None

        line = engine.open("wire", read)
        engine.leave()
        await asyncio.sleep(0.05)
        assert num_turns == 1
        line.send(b"nobody hears this")
        line.close()

    asyncio.run(talk())


def test_last_words_are_waited_for(engine: Engine) -> None:
    """An engine that leaves; the front end reads late, but not too late."""
    failure = EngineFailed("x" * MORE_THAN_FITS)
    engine.channel.send(PARENT, failure)
    with ThreadPoolExecutor(1) as reader:
        read = reader.submit(engine.wire.wait_received)
        engine.leave()
        assert msgspec.msgpack.decode(read.result(), type=FromEngine) == failure


def test_a_front_end_that_reads_nothing_delays_the_end_by_a_second_at_most(engine: Engine) -> None:
    engine.channel.send(PARENT, EngineFailed("x" * MORE_THAN_FITS))
    engine.leave()
    with pytest.raises(EOFError):
        engine.wire.wait_received()
