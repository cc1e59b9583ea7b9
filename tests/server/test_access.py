"""Who may come in, over both doors: keys and their file, TLS, origins, the admin port, the logs."""

import hmac
import logging
import re
import signal
import subprocess
import sys

import grpc
import httpx
import pytest
import trustme
from tests.server.peer import delta, made_up_logprobs
from tests.server.running import running_frontend

from shardline_client import Client, Tls
from shardline_client.errors import AuthenticationFailed, ConnectionFailed
from shardline_server import errors
from shardline_server.api_keys import ApiKeys, read_keys
from shardline_server.door_config import DoorConfig, TlsFiles
from shardline_server.errors import ConfigError
from shardline_server.messages import FinishReason
from shardline_server.protos.shardline.v1 import generation_pb2 as pb
from shardline_server.protos.shardline.v1.generation_pb2_grpc import GenerationStub

SECRET_KEYS = ("sesame-opens-up", "wrong-guess-at-it")
SECRET_PROMPT = "Grüße to nobody else"


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture(scope="module")
def files(authority, tmp_path_factory):
    """PEM files: the authority, the server's chain and key, a client's, and one of a stranger's."""
    folder = tmp_path_factory.mktemp("tls")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    for name, issuer in (("server", authority), ("client", authority), ("other", trustme.CA())):
        own = issuer.issue_cert("localhost", "127.0.0.1")
        own.private_key_pem.write_to_path(folder / f"{name}.key")
        for blob in own.cert_chain_pems:
            blob.write_to_path(folder / f"{name}.pem", append=True)
    return folder


def tls_of(files, *, mutual=False):
    return TlsFiles(
        cert=files / "server.pem",
        key=files / "server.key",
        client_ca=files / "ca.pem" if mutual else None,
    )


def shown_by(files, name):
    return Tls(
        ca_file=files / "ca.pem", cert_file=files / f"{name}.pem", key_file=files / f"{name}.key"
    )


def urls(addresses):
    secure = "s" * addresses.is_secure
    return addresses.http_url, f"grpc{secure}://{addresses.grpc_target}"


def test_tls_on_both_doors(peer, tokenizer_folder, files):
    door = DoorConfig(tls=tls_of(files))
    with running_frontend(peer.endpoint, tokenizer_folder, door=door) as running:
        for url in urls(running.addresses):
            with Client(url, tls=Tls(ca_file=files / "ca.pem")) as client:
                assert client.complete("the fox", max_tokens=1).text == "the"
        with pytest.raises(httpx.HTTPError):
            httpx.get(running.addresses.http_url.replace("https", "http") + "/health")


def test_mutual_tls_lets_in_only_clients_of_the_authority(peer, tokenizer_folder, files):
    door = DoorConfig(tls=tls_of(files, mutual=True))
    with running_frontend(peer.endpoint, tokenizer_folder, door=door) as running:
        for url in urls(running.addresses):
            with Client(url, tls=shown_by(files, "client")) as client:
                assert client.complete("the fox", max_tokens=1).text == "the"
            for stranger in (Tls(ca_file=files / "ca.pem"), shown_by(files, "other")):
                with (
                    Client(url, tls=stranger, timeout_s=20) as client,
                    pytest.raises(ConnectionFailed),
                ):
                    client.complete("the fox")
    assert peer.next_submit() and peer.next_submit() and peer.submits.empty()


@pytest.mark.parametrize(
    ("cert", "key", "client_ca"),
    [
        ("none.pem", "server.key", None),
        ("server.pem", "client.key", None),
        ("server.key", "server.key", None),
        ("server.pem", "server.key", "server.key"),
    ],
)
def test_files_that_are_no_use_are_named_at_start(
    peer, tokenizer_folder, files, cert, key, client_ca
):
    tls = TlsFiles(
        cert=files / cert,
        key=files / key,
        client_ca=None if client_ca is None else files / client_ca,
    )
    with (
        pytest.raises(ConfigError, match=rf"TLS cannot use .*{cert}.*{key}"),
        running_frontend(peer.endpoint, tokenizer_folder, door=DoorConfig(tls=tls)),
    ):
        pass


def test_keys_from_a_file(tmp_path):
    file = tmp_path / "keys"
    file.write_text(
        "# ours\nalice = not a name, since it has spaces\nalice=one\n\nalice=two\nthree\n"
    )
    door = DoorConfig(api_keys=("zero", "bob=four"), api_key_file=file)
    assert read_keys(door) == {
        "zero": "key1",
        "four": "bob",
        "alice = not a name, since it has spaces": "key3",
        "one": "alice",
        "two": "alice",
        "three": "key6",
    }


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot read the API keys in"),
        ("# none\n", "holds no API key"),
        ("b=k\nc=k\n", "same"),
    ],
)
def test_a_key_file_that_is_no_use_is_refused_and_shows_no_key(tmp_path, content, words):
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=words) as caught:
        read_keys(DoorConfig(api_key_file=file))
    assert "k" not in caught.value.message.replace(str(file), "").split()


def test_every_key_is_compared_in_full_whichever_is_right(monkeypatch):
    """Else the time that a refusal takes would tell how near a guess was."""
    keys, compared = ApiKeys({"zero": "a", "one": "b", "two": "c"}), []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda *two: compared.append(two) or real(*two))
    assert [keys.tenant_of(key, None) for key in ("zero", "one", "two")] == ["a", "b", "c"]
    with pytest.raises(errors.AuthenticationFailed):
        keys.tenant_of("none of them", None)
    assert len(compared) == 12
    assert {len(digest) for two in compared for digest in two} == {32}


def test_a_file_that_became_useless_changes_no_key(peer, tokenizer_folder, tmp_path, caplog):
    file = tmp_path / "keys"
    file.write_text("alice=one\n")
    door = DoorConfig(api_key_file=file)
    with running_frontend(peer.endpoint, tokenizer_folder, door=door) as running:
        frontend = running.frontend
        first, second = {"Authorization": "Bearer one"}, {"Authorization": "Bearer two"}
        url = f"{running.addresses.http_url}/v1/models"
        for content, good, bad in (("", first, second), ("bob=two\n", second, first)):
            file.write_text(content)
            running.call(_called(frontend.reload_keys))
            assert httpx.get(url, headers=good).status_code == 200
            assert httpx.get(url, headers=bad).status_code == 401
        assert httpx.get(url).status_code == 401
    assert "stay as they were" in caplog.text


async def _called(function):
    function()


def test_other_origins_are_closed_unless_opened(http, peer, tokenizer_folder):
    ask = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    answer = http.options("/v1/completions", headers=ask)
    assert answer.status_code == 405
    assert "access-control-allow-origin" not in answer.headers
    door = DoorConfig(cors_origins=("https://page.example",))
    with (
        running_frontend(peer.endpoint, tokenizer_folder, door=door) as running,
        httpx.Client(base_url=running.addresses.http_url) as opened,
    ):
        wanted = ask | {"Access-Control-Request-Headers": "authorization, x-latency-budget-ttft-ms"}
        answer = opened.options("/v1/completions", headers=wanted)
        assert answer.headers["access-control-allow-origin"] == "https://page.example"
        assert "x-latency-budget-ttft-ms" in answer.headers["access-control-allow-headers"]
        body = {"prompt": "the", "max_tokens": 1}
        answer = opened.post("/v1/completions", json=body, headers=ask)
        assert answer.headers["access-control-allow-origin"] == "https://page.example"
        other = opened.options("/v1/completions", headers=ask | {"Origin": "https://evil.example"})
        assert other.status_code == 400
        assert "access-control-allow-origin" not in other.headers


def test_an_admin_port_takes_metrics_and_documentation_away(peer, tokenizer_folder):
    with running_frontend(
        peer.endpoint, tokenizer_folder, door=DoorConfig(admin_port=0)
    ) as running:
        public, admin = running.addresses.http_url, running.addresses.admin_url
        assert public != admin
        for path in ("/metrics", "/docs", "/openapi.json"):
            assert httpx.get(f"{public}{path}").status_code == 404
            assert httpx.get(f"{admin}{path}").status_code == 200
        assert "/v1/completions" in httpx.get(f"{admin}/openapi.json").json()["paths"]
        assert httpx.get(f"{public}/health").status_code == 200
        assert httpx.post(f"{admin}/v1/completions", json={"prompt": "x"}).status_code == 404


def test_no_key_and_no_prompt_is_ever_logged(peer, tokenizer_folder, caplog):
    """Of the front end, the only process that sees text, at its most talkative."""
    caplog.set_level(logging.DEBUG)
    logging.getLogger("httpcore").setLevel(logging.WARNING)  # this test's own client
    peer.script = lambda submit: [
        delta(submit.request_id, 0, [300], prompt_logprobs=[made_up_logprobs(5)] * 3),
        delta(submit.request_id, 1, finish_reason=FinishReason.ERROR, error_message="no"),
    ]
    door = DoorConfig(api_keys=SECRET_KEYS[:1])
    with (
        running_frontend(peer.endpoint, tokenizer_folder, door=door) as running,
        httpx.Client(base_url=running.addresses.http_url) as http,
        grpc.insecure_channel(running.addresses.grpc_target) as channel,
    ):
        stub = GenerationStub(channel)
        for key in SECRET_KEYS:
            header = {"Authorization": f"Bearer {key}"}
            for body in (
                {"prompt": SECRET_PROMPT},
                {"prompt": SECRET_PROMPT, "stream": True},
                {"prompt": SECRET_PROMPT, "temperature": 9},
                {"messages": [{"role": "user", "content": SECRET_PROMPT}]},
                {"prompt": SECRET_PROMPT, "nonsense": 1},
                {"prompt": SECRET_PROMPT, "echo": True, "logprobs": 1},
            ):
                path = "chat/completions" if "messages" in body else "completions"
                http.post(f"/v1/{path}", json=body, headers=header)
            with pytest.raises(grpc.RpcError):
                stub.Generate(
                    pb.GenerateRequest(text=SECRET_PROMPT),
                    metadata=[("authorization", f"Bearer {key}")],
                )
    assert "zip()" in caplog.text  # what nobody expected is logged, without what it was about
    for secret in (*SECRET_KEYS, SECRET_PROMPT, "Grüße"):
        assert secret not in caplog.text


def test_a_served_process_keeps_its_secrets_and_reads_its_keys_again(tiny_model, files, tmp_path):
    """The whole thing: TLS on both doors, SIGHUP, and every process's log at debug level."""
    keys = tmp_path / "keys"
    keys.write_text(f"alice={SECRET_KEYS[0]}\n")
    command = [sys.executable, "-m", "shardline_server", "serve", str(tiny_model), "--port", "0"]
    command += ["--grpc-port", "0", "--dtype", "float32", "--log-level", "debug"]
    command += ["--api-key-file", str(keys), "--tls-cert", str(files / "server.pem")]
    command += ["--tls-key", str(files / "server.key"), "--admin-port", "0"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        found = {}
        for line in process.stdout:
            if match := re.match(r"  (HTTP|gRPC)  (\S+)", line):
                found[match[1]] = match[2].removeprefix("https://")
            if len(found) == 2:
                break
        doors = [f"https://{found['HTTP']}", f"grpcs://{found['gRPC']}"]
        tls = Tls(ca_file=files / "ca.pem")
        for door in doors:
            with Client(door, tls=tls, api_key=SECRET_KEYS[0]) as client:
                client.complete(SECRET_PROMPT, max_tokens=2)
        keys.write_text(f"alice={SECRET_KEYS[1]}\n")
        process.send_signal(signal.SIGHUP)
        for door in doors:
            with (
                Client(door, tls=tls, api_key=SECRET_KEYS[0]) as client,
                pytest.raises(AuthenticationFailed),
            ):
                while True:  # until the signal has been heard, else the test's time limit
                    client.complete(SECRET_PROMPT, max_tokens=2)
            with Client(door, tls=tls, api_key=SECRET_KEYS[1]) as client:
                client.complete(SECRET_PROMPT, max_tokens=2)
    finally:
        process.terminate()
        rest, _ = process.communicate()
    text = (tmp_path / "log").read_text() + rest
    assert process.returncode == 0
    assert "1 API keys are valid from now on" in text
    for secret in (*SECRET_KEYS, SECRET_PROMPT):
        assert secret not in text
