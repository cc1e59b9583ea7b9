"""Starting and stopping the doors."""

import asyncio
import json
import socket

import httpx
import pytest
from tests.server.peer import delta
from tests.server.running import running_frontend

from shardline_server.errors import ConfigError
from shardline_server.frontend import Addresses, Frontend, FrontendConfig
from shardline_server.messages import EngineRecovering
from shardline_shards.channel import Endpoint
from shardline_shards.gate import LaunchKeys


def start(folder, **values):
    async def run():
        defaults = {"host": "127.0.0.1", "http_port": 0, "grpc_port": 0, "model_path": folder}
        nobody = Endpoint(address="tcp://127.0.0.1:9", keys=LaunchKeys.create().client)
        names = {"engine": nobody, "served_model_names": ("tiny",)}
        frontend = Frontend(FrontendConfig(**(defaults | names | values)))
        await frontend.start()

    asyncio.run(run())


@pytest.mark.parametrize("door", ["http_port", "grpc_port"])
def test_a_port_in_use_is_named(tokenizer_folder, door):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}.*choose another port"):
            start(tokenizer_folder, **{door: port})


def test_a_second_server_does_not_share_the_ports_of_the_first(running, tokenizer_folder):
    addresses = running.addresses
    with pytest.raises(ConfigError, match=str(addresses.http_port)):
        start(tokenizer_folder, http_port=addresses.http_port)
    with pytest.raises(ConfigError, match=str(addresses.grpc_port)):
        start(tokenizer_folder, grpc_port=addresses.grpc_port)


def test_a_host_that_is_not_ours_is_named(tokenizer_folder):
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1"):
        start(tokenizer_folder, host="192.0.2.1")


def test_a_model_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="No usable tokenizer"):
        start(tmp_path)


def test_addresses_are_made_for_clients():
    assert Addresses("0.0.0.0", 80, 90).http_url == "http://127.0.0.1:80"
    assert Addresses("::", 80, 90).grpc_target == "[::1]:90"
    assert Addresses("10.0.0.5", 80, 90).grpc_target == "10.0.0.5:90"


def test_stopping_ends_open_streams_with_an_error_and_closes_the_doors(own_peer, tokenizer_folder):
    own_peer.script = lambda submit: [delta(submit.request_id, 0, [300])]
    with running_frontend(own_peer.endpoint, tokenizer_folder) as running:
        url = running.addresses.http_url
        body = {"prompt": "the", "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            running.call(running.frontend.stop())
            last = [line for line in lines if line][-1]
        assert "shutting down" in json.loads(last.removeprefix("data: "))["error"]["message"]
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")


def test_while_workers_are_replaced_streams_wait_and_new_requests_come_back_later(
    own_peer, tokenizer_folder
):
    own_peer.script = lambda submit: [delta(submit.request_id, 0, [300])]
    with (
        running_frontend(own_peer.endpoint, tokenizer_folder) as running,
        httpx.Client(base_url=running.addresses.http_url, timeout=30) as client,
        client.stream("POST", "/v1/completions", json={"prompt": "a", "stream": True}) as response,
    ):
        next(lines := response.iter_lines())
        own_peer.send(EngineRecovering("stage 1 was lost"))
        while client.get("/ready").status_code == 200:
            pass  # its news takes effect at once, else the test's time limit ends it
        for refusal in (client.get("/ready"), client.post("/v1/completions", json={"prompt": "a"})):
            assert refusal.status_code == 503
            assert int(refusal.headers["Retry-After"]) > 0
            assert "stage 1 was lost" in refusal.json()["error"]["message"]
        health = client.get("/health")
        assert (health.status_code, health.json()["status"]) == (200, "recovering")
        own_peer.send(own_peer.ready)
        while client.get("/ready").status_code != 200:
            pass
        assert client.get("/health").json() == {"status": "ok", "last_loss": "stage 1 was lost"}
        request_id = own_peer.next_submit().request_id
        own_peer.send_deltas(delta(request_id, 1, [301], finish_reason="length"))
        assert [line for line in lines if line][-1] == "data: [DONE]"


def test_grace_lets_a_request_finish(own_peer, tokenizer_folder):
    own_peer.script = lambda submit: [delta(submit.request_id, 0, [300])]
    with running_frontend(own_peer.endpoint, tokenizer_folder) as running:
        url = running.addresses.http_url
        body = {"prompt": "the", "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            stopping = asyncio.run_coroutine_threadsafe(running.frontend.drain(30), running.loop)
            request_id = own_peer.next_submit().request_id
            own_peer.send_deltas(delta(request_id, 1, [301], finish_reason="length"))
            assert [line for line in lines if line][-1] == "data: [DONE]"
        stopping.result(30)
