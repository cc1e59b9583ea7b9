"""Whoever leaves an answer ends its request: seen from the engine's side, over both doors."""

import asyncio
import subprocess
import sys
import threading

import pytest
from tests.clients.proxy import Proxy
from tests.server.peer import EnginePeer, delta

from shardline_client import AsyncClient, Client, InvalidRequest, RequestTimeout

KEY = {"api_key": "right"}


@pytest.fixture
def client(make_client, frontend_url):
    return make_client(frontend_url, **KEY)


@pytest.fixture
def one_token(peer: EnginePeer) -> None:
    """The engine says one token and then nothing more."""
    peer.script = lambda submit: [delta(submit.request_id, 0, submit.token_ids[:1])]


@pytest.mark.usefixtures("one_token")
def test_break_ends_the_request(peer, frontend_url):
    with Client(frontend_url, **KEY) as client:
        for _ in client.stream_complete("the fox"):
            break
        assert peer.next_abort() == peer.next_submit().request_id


@pytest.mark.usefixtures("one_token")
def test_break_ends_the_request_in_asyncio(peer, frontend_url):
    async def run() -> None:
        async with AsyncClient(frontend_url, **KEY) as client:
            stream = client.stream_complete("the fox")
            async for _ in stream:
                break
            assert await asyncio.to_thread(peer.next_abort) == peer.next_submit().request_id
            assert stream.completion.text == "the"

    asyncio.run(run())


@pytest.mark.usefixtures("one_token")
def test_break_ends_it_also_where_the_stream_is_kept(peer, frontend_url):
    with Client(frontend_url, **KEY) as client:
        stream = client.stream_complete("the fox")
        for _ in stream:
            break
        assert peer.next_abort() == peer.next_submit().request_id
        assert stream.completion.text == "the"


@pytest.mark.usefixtures("one_token")
def test_an_exception_ends_the_request(peer, frontend_url):
    with Client(frontend_url, **KEY) as client:
        with pytest.raises(ZeroDivisionError), client.stream_complete("the fox") as stream:
            for _ in stream:
                raise ZeroDivisionError
        assert peer.next_abort() == peer.next_submit().request_id


@pytest.mark.usefixtures("one_token")
def test_cancelling_the_reader_ends_the_request(peer, frontend_url):
    async def run() -> None:
        async with AsyncClient(frontend_url, **KEY) as client:
            reader = asyncio.create_task(client.complete("the fox"))
            submit = await asyncio.to_thread(peer.next_submit)
            reader.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reader
            assert await asyncio.to_thread(peer.next_abort) == submit.request_id

    asyncio.run(run())


def test_cancelling_before_the_first_token_ends_the_request(peer, frontend_url):
    peer.script = lambda submit: []
    test_cancelling_the_reader_ends_the_request(peer, frontend_url)


@pytest.mark.usefixtures("one_token")
def test_closing_the_client_ends_its_requests(peer, frontend_url):
    client = Client(frontend_url, **KEY)
    pieces = iter(client.stream_complete("the fox"))
    next(pieces)
    client.close()
    assert peer.next_abort() == peer.next_submit().request_id
    with pytest.raises(RuntimeError, match="closed"):
        client.models()


@pytest.mark.usefixtures("one_token")
def test_a_program_that_closes_nothing_ends_quietly(peer, frontend_url):
    script = (
        "import sys\n"
        "from shardline_client import Client\n"
        "client = Client(sys.argv[1], api_key='right')\n"
        "pieces = iter(client.stream_complete('the fox'))\n"
        "print(next(pieces).text)\n"
    )
    command = [sys.executable, "-W", "error", "-c", script, frontend_url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "the\n", "")
    assert peer.next_abort() == peer.next_submit().request_id


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_abort_from_another_thread(peer, frontend_url, num_tokens):
    """Before the first token and after it; the reader gets what there was, and the reason."""
    peer.script = lambda submit: [
        delta(submit.request_id, i, submit.token_ids[:1]) for i in range(num_tokens)
    ]
    with Client(frontend_url, **KEY) as client:
        answers = []
        reader = threading.Thread(
            target=lambda: answers.append(client.complete("the fox", request_id="mine", n=2))
        )
        reader.start()
        submits = {peer.next_submit().request_id for _ in range(2)}
        assert client.abort("mine") is True
        reader.join()
        assert {peer.next_abort() for _ in submits} == submits
        assert client.abort("mine") is False
    [answer] = answers
    assert [choice.finish_reason for choice in answer.choices] == ["abort", "abort"]
    assert answer.usage is None


@pytest.mark.usefixtures("one_token")
def test_abort_of_a_stream_in_its_own_loop(peer, frontend_url):
    with Client(frontend_url, **KEY) as client:
        stream = client.stream_complete("the fox")
        pieces = []
        for piece in stream:
            pieces.append(piece)
            stream.abort()
    assert [(piece.text, piece.finish_reason) for piece in pieces] == [("the", None), ("", "abort")]
    assert [piece.index for piece in pieces] == [0, 1]
    assert peer.next_abort() == peer.next_submit().request_id


@pytest.mark.usefixtures("one_token")
def test_over_grpc_a_request_of_another_client_can_be_aborted(peer, frontend):
    url = f"grpc://{frontend.addresses.grpc_target}"
    with Client(url, **KEY) as client, Client(url, **KEY) as other:
        pieces = iter(client.stream_complete("the fox", request_id="mine"))
        assert next(pieces).text == "the"
        assert other.abort("yours") is False
        assert other.abort("mine") is True
        submit = peer.next_submit()
        assert peer.next_abort() == submit.request_id
        assert next(pieces).finish_reason == "abort"


def test_over_http_a_request_of_another_client_cannot(client, door):
    if door == "http":
        assert client.abort("yours") is False


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_the_time_is_over(client, peer, num_tokens):
    peer.script = lambda submit: [
        delta(submit.request_id, i, submit.token_ids[:1]) for i in range(num_tokens)
    ]
    with pytest.raises(RequestTimeout):
        client.complete("the fox", timeout_s=1.5)
    assert peer.next_abort() == peer.next_submit().request_id


def test_an_id_in_use(peer, frontend_url):
    peer.script = lambda submit: [delta(submit.request_id, 0, submit.token_ids[:1])]
    with Client(frontend_url, **KEY) as client:
        first = client.stream_complete("the fox", request_id="mine")
        pieces = iter(first)
        next(pieces)
        with pytest.raises(InvalidRequest, match="in use"):
            client.complete("the fox", request_id="mine")
        first.close()
        assert list(pieces) == []


def test_a_stream_is_read_once(frontend_url):
    with Client(frontend_url, **KEY) as client:
        stream = client.stream_complete("the fox", max_tokens=2)
        assert stream.collect().text == "the fox"
        with pytest.raises(RuntimeError, match="once"):
            list(stream)


def test_connections_are_used_again(peer, frontend, make_client):
    """Of many requests in a row, whole and refused ones too, none needs a second connection."""
    for door, port in (
        ("http", int(frontend.addresses.http_url.rsplit(":")[-1])),
        ("grpc", int(frontend.addresses.grpc_target.rsplit(":")[-1])),
    ):
        with Proxy(port) as proxy:
            client = make_client(f"{door}://127.0.0.1:{proxy.port}", **KEY)
            for _ in range(3):
                assert client.complete("the fox", max_tokens=2).text == "the fox"
                client.tokenize("the fox")
            assert proxy.num_connections == 1
