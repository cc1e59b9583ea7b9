"""What goes wrong on the way is a typed error, tried again only where that can help."""

import socket
import ssl
from base64 import b64encode

import grpc
import pytest
import trustme
from tests.clients.bad_servers import GrpcBadServer, HttpBadServer, Refuse, Say, SayAtOnce
from tests.clients.proxy import Proxy
from tests.server.peer import delta

from shardline_client import (
    AuthenticationFailed,
    Client,
    ConnectionFailed,
    Overloaded,
    RequestTimeout,
    Retry,
    ServerError,
    StreamBroken,
    Tls,
)

QUICK = Retry(max_attempts=3, base_s=0.001, max_wait_s=0.5)


@pytest.fixture
def client(make_client, bad_server):
    return make_client(bad_server.url, retry=QUICK)


def test_a_good_answer_of_the_scripted_server(client, bad_server):
    bad_server.answers = [Say(3)]
    answer = client.complete("x")
    assert (answer.text, answer.finish_reason) == ("0,1,2,", "length")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 3)


def test_a_server_error_is_not_tried_again(client, bad_server):
    bad_server.answers = [Refuse("failed")]
    with pytest.raises(ServerError, match="I am failed") as caught:
        client.complete("x")
    assert caught.value.code == "why"
    assert bad_server.num_requests == 1


def test_a_full_server_is_tried_again(client, bad_server):
    bad_server.answers = [Refuse("full"), Refuse("full", "0.01"), Say(2)]
    assert client.complete("x").text == "0,1,"
    assert bad_server.num_requests == 3


def test_attempts_are_bounded_and_the_last_error_is_told(client, bad_server):
    bad_server.answers = [Refuse("full")]
    with pytest.raises(Overloaded, match="I am full") as caught:
        client.complete("x")
    assert caught.value.retry_after_s is None
    assert bad_server.num_requests == QUICK.max_attempts


def test_what_the_server_asks_for_is_waited_for(make_client, bad_server):
    """With a backoff of an hour this ends only if the server's word counts."""
    bad_server.answers = [Refuse("full", "0"), Say(1)]
    client = make_client(bad_server.url, retry=Retry(base_s=3600, max_wait_s=3600))
    assert client.complete("x", timeout_s=30).text == "0,"


def test_longer_than_allowed_is_not_waited_for(client, bad_server):
    bad_server.answers = [Refuse("full", "7")]
    with pytest.raises(Overloaded) as caught:
        client.complete("x")
    assert caught.value.retry_after_s == 7
    assert bad_server.num_requests == 1


def test_the_date_in_retry_after_counts_too():
    with HttpBadServer() as server, Client(server.url, retry=QUICK) as client:
        server.answers = [Refuse("full", "Fri, 31 Dec 2199 23:59:59 GMT")]
        with pytest.raises(Overloaded) as caught:
            client.complete("x")
    assert caught.value.retry_after_s > 1e9


def test_an_error_in_the_middle_is_told_and_never_tried_again(client, bad_server):
    bad_server.answers = [Say(2, then="error")]
    with pytest.raises(StreamBroken, match="The engine died") as caught:
        client.complete("x")
    assert caught.value.code == "engine_died"
    assert bad_server.num_requests == 1


def test_a_stream_that_just_stops_is_broken(client, bad_server):
    bad_server.answers = [Say(2, then="stop")]
    with pytest.raises(StreamBroken):
        client.complete("x")
    assert bad_server.num_requests == 1


def test_a_stream_that_ends_before_its_first_piece_is_tried_again(client, bad_server):
    bad_server.answers = [Say(0, then="stop"), Say(1)]
    assert client.complete("x").text == "0,"
    assert bad_server.num_requests == 2


@pytest.mark.parametrize("num_pieces", [0, 2])
def test_silence_ends_with_the_time(client, bad_server, num_pieces):
    bad_server.answers = [Say(num_pieces, then="silence")]
    with pytest.raises(RequestTimeout):
        client.complete("x", timeout_s=2.0)
    assert bad_server.num_requests == 1


def test_a_cut_connection_breaks_the_stream(frontend, peer, door):
    """The engine says one token and falls silent; then the network goes."""
    addresses = frontend.addresses
    address = addresses.http_url if door == "http" else addresses.grpc_target
    peer.script = lambda submit: [delta(submit.request_id, 0, submit.token_ids[:1])]
    with (
        Proxy(int(address.rsplit(":")[-1])) as proxy,
        Client(f"{door}://127.0.0.1:{proxy.port}", api_key="right") as client,
    ):
        pieces = iter(client.stream_complete("the fox"))
        assert next(pieces).text == "the"
        proxy.cut()
        with pytest.raises(StreamBroken):
            next(pieces)


def test_nobody_listens(make_client, door):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    client = make_client(f"{door}://127.0.0.1:{port}", retry=QUICK)
    for call in (client.models, lambda: client.complete("x")):
        with pytest.raises(ConnectionFailed):
            call()


def test_after_a_cut_the_next_call_connects_again(make_client, bad_server):
    with Proxy(int(bad_server.url.rsplit(":")[-1])) as proxy:
        door = bad_server.url.split(":")[0]
        client = make_client(f"{door}://127.0.0.1:{proxy.port}", retry=QUICK)
        assert client.models()[0].name == "bad"
        proxy.cut()
        assert client.complete("x").text == "0,"
        assert proxy.num_connections == 2


def test_a_kept_connection_that_turns_out_to_be_closed_is_no_failure(make_client):
    with HttpBadServer() as server:
        server.forgets_connections = True
        client = make_client(server.url, retry=Retry(max_attempts=1))
        assert client.models()[0].name == "bad"
        assert client.complete("x").text == "0,"
        assert (server.num_forgotten, server.num_requests) == (1, 1)


def test_somebody_listens_and_never_speaks(make_client, door):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"{door}://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises((RequestTimeout, ConnectionFailed)):
            make_client(url, timeout_s=0.3).models()
        with pytest.raises((RequestTimeout, ConnectionFailed)):
            make_client(url, timeout_s=0.3).complete("x")


def test_the_proxy_of_the_environment_is_used(make_client, monkeypatch):
    with HttpBadServer() as proxy:
        address = proxy.url.replace("http://", "http://me:secret@")
        monkeypatch.setenv("HTTP_PROXY", address)
        monkeypatch.setenv("NO_PROXY", "not.invalid")
        assert make_client("http://shardline.invalid").complete("x").text == "0,"
        with pytest.raises(ConnectionFailed):
            make_client("http://not.invalid", retry=QUICK).complete("x")
    (headers,) = proxy.headers
    assert headers["Host"] == "shardline.invalid"
    assert headers["Proxy-Authorization"] == "Basic " + b64encode(b"me:secret").decode()


def test_an_answer_that_is_no_stream(make_client):
    with HttpBadServer() as server:
        server.answers = [SayAtOnce()]
        with pytest.raises(ServerError, match="application/json, not text/event-stream"):
            make_client(server.url).complete("x")
    assert server.num_requests == 1


def test_keys(make_client, frontend_url):
    assert make_client(frontend_url, api_key="right").models()
    for key in (None, "wrong"):
        with pytest.raises(AuthenticationFailed) as caught:
            make_client(frontend_url, api_key=key).complete("x")
        assert caught.value.code == "invalid_api_key"


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture
def secure_url(authority, door):
    """A server that shows a certificate and wants to see one."""
    own = authority.issue_cert("localhost")
    if door == "http":
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        own.configure_cert(context)
        authority.configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED
        server = HttpBadServer(context)
    else:
        chain = b"".join(blob.bytes() for blob in own.cert_chain_pems)
        pair = (own.private_key_pem.bytes(), chain)
        root = authority.cert_pem.bytes()
        server = GrpcBadServer(grpc.ssl_server_credentials([pair], root, require_client_auth=True))
    with server:
        yield server.url


@pytest.fixture
def tls(authority, tmp_path):
    own = authority.issue_cert("me@example.org")
    names = [tmp_path / name for name in ("ca.pem", "cert.pem", "key.pem")]
    authority.cert_pem.write_to_path(names[0])
    own.cert_chain_pems[0].write_to_path(names[1])
    own.private_key_pem.write_to_path(names[2])
    return Tls(ca_file=names[0], cert_file=names[1], key_file=names[2])


def test_tls_both_ways(make_client, secure_url, tls):
    assert make_client(secure_url, tls=tls).complete("x").text == "0,"


def test_an_authority_that_is_not_trusted(make_client, secure_url):
    once = Retry(max_attempts=1)
    with pytest.raises(ConnectionFailed):
        make_client(secure_url, retry=once, timeout_s=20).complete("x")


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("127.0.0.1:8000", {}, "is not an address"),
        ("ftp://127.0.0.1", {}, "is not an address"),
        ("http://", {}, "is not an address"),
        ("grpc://127.0.0.1:1/v1", {}, "no path"),
        ("grpc://127.0.0.1:1", {"openai_only": True}, "about HTTP"),
        ("http://127.0.0.1", {"tls": Tls()}, "does not use TLS"),
    ],
)
def test_an_address_that_cannot_be_meant(url, options, message):
    with pytest.raises(ValueError, match=message):
        Client(url, **options)
    with pytest.raises(ValueError, match="go together"):
        Tls(cert_file="x")
