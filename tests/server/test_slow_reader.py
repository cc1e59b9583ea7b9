"""One of 32 readers stops reading: it ends alone, in bounded memory, and the rest lose nothing."""

import json
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Barrier

import grpc
import httpx
import psutil
import pytest
from tests.server.frontend_process import frontend_process
from tests.server.peer import EnginePeer, delta

from shardline_scheduler.plan import TokenLogprobs
from shardline_server.door_config import DoorLimits
from shardline_server.frontend import Addresses
from shardline_server.messages import Delta, FinishReason, Submit
from shardline_server.protos.shardline.v1 import generation_pb2 as pb
from shardline_server.protos.shardline.v1.generation_pb2_grpc import GenerationStub

NUM_READERS = 31
NUM_TOKENS = 50
MAX_UNREAD = 1000
NUM_FLOOD = 60_000  # two hundred MB where nobody bounds it
MAX_GROWTH_BYTES = 48 * 2**20
LOGPROBS = TokenLogprobs(300, -0.5, [(300 + i, -0.5 - i / 7) for i in range(20)])
OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]  # as clients elsewhere have
Reader = Callable[[Barrier], list[int]]


def flood(peer: EnginePeer, request_id: str) -> None:
    """Far more than fits, in steps that the front end is to get through one by one."""
    for start in range(0, NUM_FLOOD, 500):
        indexes = range(start, start + 500)
        peer.send_deltas(*(delta(request_id, i, [300], logprobs=[LOGPROBS]) for i in indexes))


def tokens_of(number: int) -> list[int]:
    return [3 + (7 * number + i) % 390 for i in range(NUM_TOKENS)]


def first_token(submit: Submit) -> list[Delta]:
    return [delta(submit.request_id, 0, tokens_of(submit.sampling.seed)[:1])]


def the_rest(submit: Submit) -> list[Delta]:
    *middle, last = list(enumerate(tokens_of(submit.sampling.seed)))[1:]
    name = submit.request_id
    return [
        *(delta(name, i, [token]) for i, token in middle),
        delta(name, last[0], [last[1]], finish_reason=FinishReason.LENGTH),
    ]


@contextmanager
def stalled_http(addresses: Addresses) -> Iterator[object]:
    body = {"prompt": "x", "stream": True, "seed": NUM_READERS, "logprobs": 20}
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((addresses.host, addresses.http_port))
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + content)
        yield connection


@contextmanager
def stalled_grpc(addresses: Addresses) -> Iterator[object]:
    with grpc.insecure_channel(addresses.grpc_target, OWN_CONNECTION) as channel:
        sampling = pb.SamplingParams(seed=NUM_READERS, logprobs=20)
        request = pb.GenerateRequest(text="x", sampling=sampling)
        call = GenerationStub(channel).GenerateStream(request)  # one that nobody holds is cancelled
        yield call


def read_http(addresses: Addresses, number: int, begun: Barrier) -> list[int]:
    body = {"prompt": "x", "stream": True, "seed": number, "return_token_ids": True}
    url = f"{addresses.http_url}/v1/completions"
    with httpx.stream("POST", url, json=body, timeout=60) as response:
        lines = (line for line in response.iter_lines() if line)
        received = [next(lines)]
        begun.wait()
        received += lines
    *records, done = [line.removeprefix("data: ") for line in received]
    assert done == "[DONE]"
    return [token for one in records for token in json.loads(one)["choices"][0]["token_ids"]]


def read_grpc(addresses: Addresses, number: int, begun: Barrier) -> list[int]:
    with grpc.insecure_channel(addresses.grpc_target, OWN_CONNECTION) as channel:
        request = pb.GenerateRequest(text="x", sampling=pb.SamplingParams(seed=number))
        pieces = GenerationStub(channel).GenerateStream(request)
        received = [next(pieces)]
        begun.wait()
        received += pieces
    assert received[-1].finish_reason == pb.FINISH_REASON_LENGTH
    return [token for piece in received for token in piece.token_ids]


DOORS = {"http": (stalled_http, read_http), "grpc": (stalled_grpc, read_grpc)}


@pytest.mark.parametrize("door", DOORS)
def test_it_is_ended_alone_and_takes_no_more_memory_than_the_limit(
    own_peer: EnginePeer, tokenizer_folder: Path, door: str
) -> None:
    """The others have begun before the flood, and go on behind it on the same wire."""
    stall, read = DOORS[door]
    own_peer.script = first_token
    limits = DoorLimits(max_unread_pieces=MAX_UNREAD)
    begun = Barrier(NUM_READERS + 1, timeout=60)
    with ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(NUM_READERS))
        start = frontend_process(own_peer.endpoint, tokenizer_folder, limits)
        pid, addresses = stack.enter_context(start)
        readers = [threads.submit(read, addresses, i, begun) for i in range(NUM_READERS)]
        begun.wait()
        submits = [own_peer.next_submit() for _ in range(NUM_READERS)]
        own_peer.script = lambda submit: []
        stack.enter_context(stall(addresses))
        stalled = own_peer.next_submit().request_id
        before = psutil.Process(pid).memory_info().rss
        flood(own_peer, stalled)
        for submit in submits:
            own_peer.send_deltas(*the_rest(submit))
        assert [reader.result() for reader in readers] == list(map(tokens_of, range(NUM_READERS)))
        growth = psutil.Process(pid).memory_info().rss - before
        assert growth <= MAX_GROWTH_BYTES, f"{growth / 2**20:.0f} MiB more than before"
        assert own_peer.next_abort() == stalled
        assert own_peer.aborts.empty()
