"""Random bytes for every decoder of our channels, and for the live sockets of a real engine."""

import random
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import msgspec
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.engine_process import engine_config, running_engine_of
from tests.server.peer import STATS
from tests.strangers import dealer, knock

from shardline_scheduler.plan import (
    Chunk,
    Decodes,
    NewRequest,
    SamplingParams,
    StageTiming,
    StepPlan,
    StepResult,
    TokenLogprobs,
)
from shardline_server.board_keeper import BoardAnswer, Count, Put, Read, ToBoard
from shardline_server.engine_config import BoardAddress
from shardline_server.messages import (
    Abort,
    Delta,
    Drain,
    Drops,
    EngineAskedToLeave,
    EngineReady,
    FinishReason,
    FromEngine,
    Hello,
    Output,
    Submit,
    ToEngine,
)
from shardline_server.node_watch import Answer, Beat
from shardline_server.rendezvous import find_board, keep_board
from shardline_shards.channel import Unreadable, read
from shardline_shards.layout import ParallelLayout, Place
from shardline_shards.messages import (
    Failed,
    Joined,
    Loaded,
    Reform,
    Rendezvous,
    StageReport,
    Stop,
    decode_from_worker,
    decode_to_worker,
)

FUZZ = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=400,
    suppress_health_check=list(HealthCheck),
)
SAMPLING = SamplingParams(max_tokens=3, seed=1, logit_bias={5: -1.0}, stop_token_ids=(2,))
PLAN = StepPlan(
    7,
    [1],
    [NewRequest(2, [5, 6], 2, SAMPLING)],
    Decodes([0], [9], [4], [(0, 3)]),
    [Chunk(2, 0, 2, [0], True)],
)
RESULT = StepResult(7, [4, 5], {2: TokenLogprobs(5, -0.5, [(5, -0.5)])})
TIMING = StageTiming(0, 7, 1.0, 0.1, 0.1, 0.1, 0.1, 0.1)
DELTA = Delta("a", 0, [5], [], [], FinishReason.STOP, None, None, 0)
# Nothing, how a CURVE peer begins, and that with the head of its next command.
GREETING = b"\xff" + b"\0" * 8 + b"\x7f\x03\x01CURVE" + b"\0" * 48
GREETINGS = [b"", GREETING, GREETING + b"\x04\xc8\x05HELLO\x01\x00"]
Decode = Callable[[bytes], object]
SECRET = "a secret of the tests"
# Of each channel and direction: how it is read, and messages that are really sent there.
CHANNELS: dict[str, tuple[Decode, list[object]]] = {
    "to the engine": (
        msgspec.msgpack.Decoder(ToEngine).decode,
        [Hello(), Submit("a", [5, 6], SAMPLING), Abort("a"), Drain(1.0)],
    ),
    "from the engine": (
        msgspec.msgpack.Decoder(FromEngine).decode,
        [
            Output([DELTA], STATS),
            EngineReady(64, 100, 16, 512),
            EngineAskedToLeave("node 1 was told to leave"),
            Drops({"worker": 1}),
        ],
    ),
    "to a worker": (
        decode_to_worker,
        [PLAN, Rendezvous(["tcp://127.0.0.1:9", None]), Reform(1), Stop()],
    ),
    "from a worker": (
        decode_from_worker,
        [
            RESULT,
            StageReport([TIMING], 1.0),
            Joined(0, 0, "tcp://127.0.0.1:9"),
            Loaded(0, 0, 9, 9, 9, 9, "cpu"),
            Failed(0, 0, "no", True),
        ],
    ),
    "to the head": (msgspec.msgpack.Decoder(Beat).decode, [Beat([], 3, True)]),
    "to the board": (
        msgspec.msgpack.Decoder(ToBoard).decode,
        [Put(0, "job", b"sealed"), Read(1, "job"), Count(2, "arrivals")],
    ),
    "from the board": (
        msgspec.msgpack.Decoder(BoardAnswer).decode,
        [BoardAnswer(1, b"sealed"), BoardAnswer(2, 7)],
    ),
    "to a node": (msgspec.msgpack.Decoder(Answer).decode, [Answer(restarted=[(Place(0, 0), 1)])]),
}


@pytest.mark.parametrize("channel", CHANNELS)
def test_what_is_sent_is_read(channel: str) -> None:
    decode, messages = CHANNELS[channel]
    for message in messages:
        assert read(decode, [msgspec.msgpack.encode(message)]) == message


@pytest.mark.parametrize("channel", CHANNELS)
@FUZZ
@given(frames=st.lists(st.binary(max_size=200), max_size=3))
def test_random_bytes_are_a_message_or_unreadable(channel: str, frames: list[bytes]) -> None:
    with suppress(Unreadable):
        read(CHANNELS[channel][0], frames)


@pytest.mark.parametrize("channel", CHANNELS)
@FUZZ
@given(data=st.data())
def test_messages_with_changed_bytes_are_messages_or_unreadable(
    channel: str, data: st.DataObject
) -> None:
    decode, messages = CHANNELS[channel]
    payload = bytearray(msgspec.msgpack.encode(data.draw(st.sampled_from(messages))))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(payload) - 1))
        end = place + data.draw(st.integers(0, 5))
        payload[place:end] = data.draw(st.binary(max_size=8))
        if not payload:
            break
    with suppress(Unreadable):
        read(decode, [bytes(payload)])


@pytest.mark.parametrize(
    "payload", [b"\x91" * 100_000, b"\x81\xa1x" * 50_000, b"\xdf" + b"\xff" * 9]
)
@pytest.mark.parametrize("channel", CHANNELS)
def test_deep_and_huge_things_are_unreadable(channel: str, payload: bytes) -> None:
    with pytest.raises(Unreadable):
        read(CHANNELS[channel][0], [payload])


def random_payloads(rng: random.Random, decode: Decode) -> Iterator[bytes]:
    """No messages, some of them nearly."""
    for _ in range(200):
        payload = rng.choice([b"", b"\x93", b"\x82\xa4type"]) + rng.randbytes(rng.randrange(200))
        try:
            read(decode, [payload])
        except Unreadable:
            yield payload


def test_a_board_lives_through_all_of_it_and_counts_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = BoardAddress(host="127.0.0.1", port=free.getsockname()[1])
    rng = random.Random(7)
    with closing(keep_board(address, SECRET)) as keeper:
        where, keys = keeper.endpoint.address, keeper.endpoint.keys
        for _ in range(60):
            knock(where, rng.choice(GREETINGS) + rng.randbytes(rng.randrange(300)))
        payloads = list(random_payloads(rng, CHANNELS["to the board"][0]))
        find = find_board(address, SECRET, time.monotonic() + 30)
        with dealer(where, keys, b"a peer") as peer, closing(find) as node:
            for payload in payloads:
                peer.send(payload)
            while keeper.num_dropped < 60 + len(payloads):
                assert node.measure_round_trip() > 0
            assert node.draw_number() == 1
        assert keeper.num_dropped == 60 + len(payloads)
    assert len(payloads) > 150


def test_an_engine_lives_through_all_of_it_and_counts_it(tiny_model: Path) -> None:
    config = engine_config(tiny_model, ParallelLayout(tp=1, stage_layers=(2, 1)))
    rng = random.Random(6)
    asked = {"asked": ([5, 6, 7], SamplingParams(max_tokens=10, seed=0, temperature=0.0))}
    with running_engine_of(config) as engine:
        before = engine.generate(asked)["asked"].token_ids
        wanted = {"frontend": 0, "worker": 0, "tensor": 0}
        for connection in psutil.Process(engine.pid).net_connections("tcp"):
            if connection.status != psutil.CONN_LISTEN:
                continue
            address = "tcp://{}:{}".format(*connection.laddr)
            channel = "frontend" if address == engine.address else "worker"
            for _ in range(60):
                knock(address, rng.choice(GREETINGS) + rng.randbytes(rng.randrange(300)))
                wanted[channel] += 1
            with dealer(address, config.keys.client, b"a peer") as peer:
                direction = "to the engine" if channel == "frontend" else "from a worker"
                for payload in random_payloads(rng, CHANNELS[direction][0]):
                    peer.send(payload)
                    wanted[channel] += 1
                while engine.drops != wanted:
                    engine.receive_any()
        assert engine.generate(asked)["asked"].token_ids == before
    assert min(wanted["frontend"], wanted["worker"]) > 200
