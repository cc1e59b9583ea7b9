"""Heads and nodes as processes in two network namespaces: started, asked, refused."""

import os
import random
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
from tests.server.namespaces import DOOR_ADDRESS, HEAD_ADDRESS, Hosts
from tests.server.test_serve import read_url

PORT = 29500
RENDEZVOUS = f"{HEAD_ADDRESS}:{PORT}"
SECRET = "a secret of the tests"
PYTHON = [sys.executable, "-m", "shardline_server"]
_RNG = random.Random(5)
PROMPTS = [[_RNG.randrange(3, 400) for _ in range(_RNG.randint(1, 60))] for _ in range(8)]
HEAD_OPTIONS = (
    *("--host", DOOR_ADDRESS, "--port", "0", "--grpc-port", "0"),
    *("--dtype", "float32", "--threads-per-worker", "1"),
)


def start(
    hosts: Hosts, namespace: str, *command: str, secret: str = SECRET, **variables: str
) -> subprocess.Popen:
    return subprocess.Popen(
        hosts.on(namespace, *command),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"SHARDLINE_SECRET": secret} | variables,
        start_new_session=True,
    )


def start_alone(model: Path) -> subprocess.Popen:
    command = [*PYTHON, "serve", str(model), "--port", "0", "--grpc-port", "0"]
    return subprocess.Popen(
        [*command, "--dtype", "float32"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def start_head(hosts: Hosts, model: Path, *options: str, port: int = PORT) -> subprocess.Popen:
    nodes = ("--nodes", "2", "--iface", "wire0", "--rendezvous", f":{port}")
    command = [*PYTHON, "serve", str(model), *HEAD_OPTIONS, *nodes, *options]
    return start(hosts, hosts.head, *command)


def start_node(
    hosts: Hosts, *options: str, secret: str = SECRET, port: int = PORT, **variables: str
) -> subprocess.Popen:
    where = ("--join", f"{HEAD_ADDRESS}:{port}", "--iface", "wire1")
    command = [*PYTHON, "worker", *where, *options]
    return start(hosts, hosts.node, *command, secret=secret, **variables)


@contextmanager
def ended(*processes: subprocess.Popen):
    """See to it that none of these is left behind, nor what a launcher among them has started."""
    try:
        yield processes
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@contextmanager
def launched(hosts: Hosts, model: Path, *options: str, port: int = PORT):
    head = start_head(hosts, model, *options, port=port)
    with ended(head, start_node(hosts, port=port)) as (head, node):
        yield head, node, read_url_after_join_line(head)


def read_url_after_join_line(head: subprocess.Popen, where: str = HEAD_ADDRESS) -> str:
    assert head.stdout is not None
    lines = []
    for line in head.stdout:
        lines.append(line)
        if f"--join {where}" in line:
            break
    assert any("SHARDLINE_SECRET=" in line for line in lines), lines
    return read_url(head)


def generate(url: str) -> list[list[int]]:
    """The continuations of PROMPTS, all at once and greedy."""
    body = {"prompt": PROMPTS, "max_tokens": 20, "temperature": 0, "return_token_ids": True}
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
    response.raise_for_status()
    return [choice["token_ids"] for choice in response.json()["choices"]]


def refused(process: subprocess.Popen) -> str:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2, errors
    return errors.strip().splitlines()[-1]
