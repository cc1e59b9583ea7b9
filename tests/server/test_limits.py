"""How much one client may take, over both doors, and that it is ended alone where it takes more."""

import json
import socket
from contextlib import ExitStack

import grpc
import httpx
import pytest
from tests.server.peer import WAIT_S, delta, silence
from tests.server.running import running_frontend

from shardline_server.door_config import DoorConfig, DoorLimits
from shardline_server.engine_client import DeltaStream
from shardline_server.messages import FinishReason
from shardline_server.protos.shardline.v1 import generation_pb2 as pb
from shardline_server.protos.shardline.v1.generation_pb2_grpc import GenerationStub

LIMITS = DoorLimits(
    max_body_bytes=20_000,
    max_header_bytes=4_000,
    read_timeout_s=0.5,
    write_timeout_s=0.5,
    max_unread_pieces=40,
    max_prompts=2,
    max_n=3,
    max_stop_strings=2,
    max_logit_bias=4,
    max_tenant_requests=2,
)
FLOOD_TOKENS = [300] * 50_000


@pytest.fixture(scope="module")
def limited(shared_peer, tokenizer_folder):
    door = DoorConfig(limits=LIMITS)
    with running_frontend(shared_peer.endpoint, tokenizer_folder, door=door) as running:
        yield running


@pytest.fixture
def http(limited, peer):
    with httpx.Client(base_url=limited.addresses.http_url, timeout=WAIT_S) as client:
        yield client


@pytest.fixture
def channel(limited, peer):
    with open_channel(limited) as channel:
        yield channel


@pytest.fixture
def stub(channel):
    return GenerationStub(channel)


def open_channel(running):
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_metadata_size", 100_000)]
    options += [("grpc.absolute_max_metadata_size", 100_000)]
    return grpc.insecure_channel(running.addresses.grpc_target, options)


def error_of(call):
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


def connect(limited, receive_buffer=65536):
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(WAIT_S)
    connection.connect((limited.addresses.host, limited.addresses.http_port))
    return connection


def read_all(connection):
    received = b""
    while piece := connection.recv(65536):
        received += piece
    return received


def status_and_error(response: bytes):
    head, _, body = response.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


def test_a_body_that_is_too_long(http, stub, peer):
    long = "x" * 20_001
    response = http.post("/v1/completions", json={"prompt": long})
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"
    assert "20000 bytes" in response.json()["error"]["message"]
    error = error_of(lambda: stub.Generate(pb.GenerateRequest(text=long)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in error.details()
    assert peer.submits.empty()
    assert http.post("/v1/completions", json={"prompt": "x"}).status_code == 200


def test_a_body_that_does_not_say_how_long_it_is(http):
    pieces = iter([b'{"prompt": "', *[b"x" * 1000] * 21, b'"}'])
    headers = {"Content-Type": "application/json"}
    response = http.post("/v1/completions", content=pieces, headers=headers)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"


@pytest.mark.parametrize("is_whole", [True, False])
def test_headers_that_are_too_long(limited, is_whole):
    with connect(limited) as connection:
        end = b"\r\n\r\n" if is_whole else b""
        connection.sendall(b"GET /health HTTP/1.1\r\nX: " + b"y" * 5000 + end)
        status, error = status_and_error(read_all(connection))
    assert (status, error["code"]) == (431, "headers_too_large")
    assert "4000 bytes" in error["message"]


def test_metadata_that_is_too_long(stub, peer):
    error = error_of(
        lambda: stub.Generate(pb.GenerateRequest(text="x"), metadata=[("x-long", "y" * 5000)])
    )
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert peer.submits.empty()


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"POST /v1/completions HTTP/1.1\r\nHost:",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{",
    ],
)
def test_a_request_that_never_ends_is_ended(limited, peer, sent):
    with connect(limited) as connection:
        connection.sendall(sent)
        status, error = status_and_error(read_all(connection))
    assert (status, error["code"]) == (408, "slow_request")
    assert peer.submits.empty()


def test_a_slow_second_request_on_a_connection_is_ended_too(limited):
    first = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"
    with connect(limited) as connection:
        connection.sendall(first + b"GET /ver")
        received = read_all(connection)
    assert received.startswith(b"HTTP/1.1 200")
    assert b"HTTP/1.1 408" in received


def test_a_grpc_connection_that_says_nothing_is_closed(limited, stub):
    with socket.create_connection(
        (limited.addresses.host, limited.addresses.grpc_port), timeout=WAIT_S
    ) as connection:
        read_all(connection)
    assert stub.Generate(pb.GenerateRequest(text="x", sampling={"max_tokens": 1})).usage


def test_an_answer_may_take_longer_than_a_request(limited, peer):
    """Another connection, that says nothing, shows when the time of a request is over."""
    peer.script = silence
    with ExitStack() as stack:
        waiting = send_and_never_read(limited, stack, "http")
        request_id = peer.next_submit().request_id
        read_all(stack.enter_context(connect(limited)))
        peer.send_deltas(delta(request_id, 0, [300], finish_reason=FinishReason.LENGTH))
        assert waiting.recv(100).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": ["a", "b", "c"]}, "prompt", "3 prompts; this server takes at most 2"),
        ({"n": 4}, "n", "4 choices of a prompt; this server takes at most 3"),
        ({"stop": ["a", "b", "c"]}, "stop", "3 stop strings; this server takes at most 2"),
        (
            {"logit_bias": {str(i): 1 for i in range(5)}},
            "logit_bias",
            "5 entries; this server takes at most 4",
        ),
    ],
)
def test_too_much_of_one_thing(http, stub, peer, fields, param, words):
    response = http.post("/v1/completions", json={"prompt": "x"} | fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert words in response.json()["error"]["message"]
    if param != "prompt":  # gRPC has one
        bias = {int(key): value for key, value in fields.get("logit_bias", {}).items()}
        rest = {name: value for name, value in fields.items() if name != "logit_bias"}
        sampling = pb.SamplingParams(**rest, logit_bias=bias)
        error = error_of(lambda: stub.Generate(pb.GenerateRequest(text="x", sampling=sampling)))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert words in error.details()
    assert peer.submits.empty()


def test_a_tenant_may_have_only_so_many_requests_under_way(http, stub, peer):
    peer.script = lambda submit: [delta(submit.request_id, 0, [300])]
    body = {"prompt": "x", "stream": True}
    mine = {"X-Tenant": "mine"}
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(http.stream("POST", "/v1/completions", json=body, headers=mine))
        response = http.post("/v1/completions", json=body, headers=mine)
        assert (response.status_code, response.headers["retry-after"]) == (429, "1")
        assert response.json()["error"]["code"] == "tenant_quota_exceeded"
        call = lambda **options: next(  # noqa: E731
            stub.GenerateStream(pb.GenerateRequest(text="x"), **options)
        )
        error = error_of(lambda: call(metadata=[("x-tenant", "mine")]))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert call(metadata=[("x-tenant", "another")]).token_ids == [300]
    for _ in range(3):
        peer.next_abort()
    peer.script = lambda submit: [
        delta(submit.request_id, 0, [300], finish_reason=FinishReason.STOP)
    ]
    assert http.post("/v1/completions", json=body, headers=mine).status_code == 200


def flood(num_pieces):
    """Pieces that fill every buffer on the way, and no end."""
    return lambda submit: [
        delta(submit.request_id, len(FLOOD_TOKENS) * i, FLOOD_TOKENS) for i in range(num_pieces)
    ]


def send_and_never_read(running, stack, door):
    """A request for a stream; what the client holds of it."""
    if door == "grpc":
        stub = GenerationStub(stack.enter_context(open_channel(running)))
        return stub.GenerateStream(pb.GenerateRequest(text="x"))
    connection = stack.enter_context(connect(running, receive_buffer=4096))
    content = json.dumps({"prompt": "x", "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
    connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + content)
    return connection


@pytest.mark.parametrize("door", ["http", "grpc"])
def test_a_client_that_stops_reading_is_cut_off_and_frees_its_request(limited, http, peer, door):
    peer.script = flood(30)
    with ExitStack() as stack:
        kept = send_and_never_read(limited, stack, door)
        assert peer.next_abort() == peer.next_submit().request_id
        assert http.get("/load").json()["server_load"] == 0
        if door == "grpc":
            error = error_of(lambda: list(kept))
            assert error.code() is grpc.StatusCode.ABORTED
            assert "Nothing was read for 0.5 s" in error.details()


def test_of_what_is_not_read_no_more_is_kept_than_the_limit():
    aborted = []
    stream = DeltaStream(["a", "b"], aborted.extend, max_unread=5)
    for index in range(1000):
        stream.put(delta("a", index, [300]))
        assert stream._queue.qsize() <= 10
    assert sorted(set(aborted)) == ["a", "b"]


@pytest.mark.parametrize("door", ["http", "grpc"])
def test_a_client_that_is_too_far_behind_is_ended_with_one_error(peer, tokenizer_folder, door):
    """It reads the first piece, and then no more."""
    peer.script = lambda submit: [delta(submit.request_id, 0, [300])]
    config = DoorConfig(limits=DoorLimits(max_unread_pieces=40))
    with (
        running_frontend(peer.endpoint, tokenizer_folder, door=config) as running,
        ExitStack() as stack,
    ):
        kept = send_and_never_read(running, stack, door)
        received = b""
        if door == "grpc":
            assert next(kept).token_ids == [300]
        while door == "http" and b"data: " not in received:
            received += kept.recv(4096)
        submit = peer.next_submit()
        peer.send_deltas(*flood(100)(submit))
        assert peer.next_abort() == submit.request_id
        if door == "grpc":
            error = error_of(lambda: list(kept))
            assert (error.code(), "unread" in error.details()) == (grpc.StatusCode.ABORTED, True)
            return
        while b'"error"' not in received[-4096:]:
            received += kept.recv(65536)
    *_, last = (line for line in received.split(b"\n") if line.startswith(b"data: "))
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "reader_too_slow"
    assert b"[DONE]" not in received
    assert received.count(b'"error"') == 1
