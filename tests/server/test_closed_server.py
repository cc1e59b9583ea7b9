"""A whole server as a stranger finds it: where it listens, what it shows, what it drops."""

import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import msgspec
import psutil
import pytest
from tests.engine_process import engine_config
from tests.server.conftest import running_engine_process
from tests.server.running import RunningFrontend, running_frontend
from tests.server.test_step_watch import plan_of
from tests.server.two_nodes import PYTHON, SECRET, ended, read_url_after_join_line
from tests.strangers import RAW_BYTES, WRONG_KEYS, dealer, knock, wait_until_turned_away

from shardline_scheduler.plan import StepResult
from shardline_server.engine_launch import EngineProcess
from shardline_server.frontend_channel import PARENT
from shardline_server.messages import Drain
from shardline_server.rendezvous import derive_keys
from shardline_server.worker_group import WorkerGroup
from shardline_shards.gate import Gate
from shardline_shards.layout import ParallelLayout
from shardline_shards.messages import Failed, encode

ASKED = {"prompt": [5, 6, 7], "max_tokens": 8, "temperature": 0, "return_token_ids": True}
NUM_PROCESSES = 5  # engine and four workers


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[EngineProcess]:
    with running_engine_process(tiny_model, tp=2, log_level="debug", spare_worker=False) as engine:
        yield engine


@pytest.fixture(scope="module")
def running(engine: EngineProcess, tiny_model: Path) -> Iterator[RunningFrontend]:
    with running_frontend(engine.wait_begun(), tiny_model) as running:
        yield running


def processes_of(engine: EngineProcess) -> list[psutil.Process]:
    own = psutil.Process(engine._process.pid)
    found = [own, *own.children(recursive=True)]
    assert len(found) == NUM_PROCESSES
    return found


def listening(process: psutil.Process) -> set[tuple[str, int]]:
    connections = process.net_connections("inet")
    waiting = [one for one in connections if one.status in (psutil.CONN_LISTEN, psutil.CONN_NONE)]
    return {(one.laddr.ip.removeprefix("::ffff:"), one.laddr.port) for one in waiting}


def generate(running: RunningFrontend) -> list[int]:
    return generate_at(running.addresses.http_url)


def generate_at(url: str) -> list[int]:
    answer = httpx.post(f"{url}/v1/completions", json=ASKED, timeout=60)
    return list(answer.raise_for_status().json()["choices"][0]["token_ids"])


def drops(running: RunningFrontend) -> dict[str, int]:
    return drops_at(running.addresses.http_url)


def drops_at(url: str) -> dict[str, int]:
    text = httpx.get(f"{url}/metrics").text
    found = re.findall(r'internal_messages_dropped_total\{channel="(\w+)".*\} ([\d.]+)', text)
    return {channel: int(float(count)) for channel, count in found}


def wait_for_drops(running: RunningFrontend, wanted: dict[str, int]) -> None:
    """Until the metric says so; the engine tells it twice a second."""
    while drops(running) != wanted:
        pass


def test_no_process_listens_at_every_address(
    engine: EngineProcess, running: RunningFrontend
) -> None:
    everybody = [*processes_of(engine), psutil.Process()]
    found = {process.pid: listening(process) for process in everybody}
    assert len(found[engine._process.pid]) == 2  # front ends, workers
    assert {host for addresses in found.values() for host, _ in addresses} == {"127.0.0.1"}


def test_keys_show_neither_in_commands_nor_in_variables_nor_in_logs(
    engine: EngineProcess, running: RunningFrontend, capfd: pytest.CaptureFixture[str]
) -> None:
    generate(running)
    keys = engine.keys
    texts = [str((p.cmdline(), p.environ())) for p in processes_of(engine)]
    texts += capfd.readouterr()
    for secret in msgspec.structs.astuple(keys):
        assert not any(secret in text for text in texts)


def test_strangers_at_every_port_are_counted_and_change_nothing(
    engine: EngineProcess, running: RunningFrontend
) -> None:
    before, dropped = generate(running), drops(running)
    processes = processes_of(engine)
    ports = {"frontend": 1, "worker": 1, "tensor": len(processes) - 1}
    addresses = [address for process in processes for address in listening(process)]
    assert len(addresses) == sum(ports.values())
    for host, port in addresses:
        for payload in RAW_BYTES.values():
            knock(f"tcp://{host}:{port}", payload)
    wanted = {channel: dropped[channel] + n * len(RAW_BYTES) for channel, n in ports.items()}
    wait_for_drops(running, wanted)
    assert generate(running) == before
    assert all(process.is_running() for process in processes)


def test_what_peers_send_that_is_no_message_is_counted_and_changes_nothing(
    engine: EngineProcess, running: RunningFrontend
) -> None:
    before, dropped = generate(running), drops(running)
    with ExitStack() as peers:
        for host, port in listening(processes_of(engine)[0]):
            for name in (b"\xff", b"another", b"0.0"):  # the last is a worker's already
                peer = dealer(f"tcp://{host}:{port}", engine.keys, name)
                peers.enter_context(peer).send(b"\xc1 no message")
        wanted = {"frontend": dropped["frontend"] + 3, "worker": dropped["worker"] + 3}
        wait_for_drops(running, dropped | wanted)
        assert generate(running) == before


@pytest.mark.parametrize(
    ("name", "payload"),
    [
        (b"0.0", encode(Failed(0, 0, "not true", True))),
        (PARENT, msgspec.msgpack.encode(Drain(0.0))),
    ],
    ids=["worker", "front end"],
)
def test_who_speaks_in_the_name_of_somebody_on_a_wire_is_not_listened_to(
    engine: EngineProcess, running: RunningFrontend, name: bytes, payload: bytes
) -> None:
    before, dropped = generate(running), drops(running)
    with ExitStack() as peers:
        for host, port in listening(processes_of(engine)[0]):
            peer = dealer(f"tcp://{host}:{port}", engine.keys, name)
            peers.enter_context(peer).send(payload)
        wanted = {"frontend": dropped["frontend"] + 1, "worker": dropped["worker"] + 1}
        wait_for_drops(running, dropped | wanted)
        assert generate(running) == before


def start(*command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*PYTHON, *command, "--log-level", "debug"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"SHARDLINE_SECRET": SECRET},
        start_new_session=True,
    )


def all_of(*heads: subprocess.Popen[str]) -> list[psutil.Process]:
    own = [psutil.Process(head.pid) for head in heads]
    return own + [child for process in own for child in process.children(recursive=True)]


def test_a_launch_starts_though_strangers_come_to_its_rendezvous_and_shows_no_key_of_it(
    running: RunningFrontend, tiny_model: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        where = f"127.0.0.1:{free.getsockname()[1]}"
    address, keys = f"tcp://{where}", derive_keys(SECRET)
    options = ("--nodes", "2", "--pp", "2", "--dtype", "float32", "--threads-per-worker", "1")
    doors = ("--port", "0", "--grpc-port", "0")
    with ended(start("serve", str(tiny_model), *options, *doors, "--rendezvous", where)) as (head,):
        for kind in WRONG_KEYS.values():
            with dealer(address, kind(keys.client), b"1") as stranger:
                stranger.send(b"spoilt")
                wait_until_turned_away(stranger)
        for payload in RAW_BYTES.values():
            knock(address, payload)
        with ended(start("worker", "--join", where)) as (node,):
            url = read_url_after_join_line(head, where)
            assert generate_at(url) == generate(running)
            while drops_at(url)["rendezvous"] < len(WRONG_KEYS) + len(RAW_BYTES):
                pass
            texts = [str((p.cmdline(), p.environ())) for p in all_of(head, node)]
            head.send_signal(signal.SIGTERM)
            texts += [text for one in (head, node) for text in one.communicate(timeout=60)]
            assert (head.returncode, node.returncode) == (0, 0)
    assert any("has joined" in text for text in texts)
    for key in (keys.server_secret, *msgspec.structs.astuple(keys.client)):
        assert not any(key in text for text in texts)
    with socket.create_server(("127.0.0.1", int(where.rpartition(":")[2]))):
        pass


def test_a_worker_drops_what_it_cannot_read_and_the_engine_counts_it(
    tiny_model: Path, tmp_path: Path
) -> None:
    config = engine_config(tiny_model, ParallelLayout(tp=1, stage_layers=(3,)))
    gate = Gate(config.keys)
    group = WorkerGroup(config, gate)
    group.start()
    try:
        group._send_to(group._names[0], b"\xc1")
        group.submit(plan_of(0, token_id=5))
        results: list[object] = []
        while not results:
            assert group.poll(30_000)
            results += group.results()
        assert isinstance(results[0], StepResult)
        assert group.num_dropped() == {"worker": 1, "tensor": 0}
    finally:
        group.kill()
        gate.close()
