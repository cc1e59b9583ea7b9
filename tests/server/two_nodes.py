"""Heads and nodes as processes in two network namespaces: started, asked, refused."""

import os
import random
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import httpx
from tests.server.namespaces import DOOR_ADDRESS, HEAD_ADDRESS, Hosts
from tests.server.test_serve import read_url

RENDEZVOUS = f"{HEAD_ADDRESS}:29500"
SECRET = "a secret of the tests"
PYTHON = [sys.executable, "-m", "shardline_server"]
HEAD_OPTIONS = (
    *("--host", DOOR_ADDRESS, "--port", "0", "--grpc-port", "0"),
    *("--dtype", "float32", "--threads-per-worker", "1"),
)
BY_HAND = ("--nodes", "2", "--rendezvous", RENDEZVOUS)


def start(
    hosts: Hosts, namespace: str, *command: str, secret: str = SECRET, **variables: str
) -> subprocess.Popen:
    return subprocess.Popen(
        hosts.inside(namespace, *command),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"SHARDLINE_SECRET": secret} | variables,
    )


def start_alone(model: Path) -> subprocess.Popen:
    command = [*PYTHON, "serve", str(model), "--port", "0", "--grpc-port", "0"]
    return subprocess.Popen(
        [*command, "--dtype", "float32"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def start_head(hosts: Hosts, model: Path, *options: str) -> subprocess.Popen:
    command = [*PYTHON, "serve", str(model), *HEAD_OPTIONS, *BY_HAND, *options]
    return start(hosts, hosts.head, *command)


def start_node(hosts: Hosts, *options: str, secret: str = SECRET) -> subprocess.Popen:
    command = [*PYTHON, "worker", "--join", RENDEZVOUS, *options]
    return start(hosts, hosts.node, *command, secret=secret)


@contextmanager
def ended(*processes: subprocess.Popen):
    """See to it that none of these is left behind."""
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@contextmanager
def launched(hosts: Hosts, model: Path, *options: str):
    with ended(start_head(hosts, model, *options), start_node(hosts)) as (head, node):
        yield head, node, read_url_after_join_line(head)


def read_url_after_join_line(head: subprocess.Popen) -> str:
    assert head.stdout is not None
    lines = []
    for line in head.stdout:
        lines.append(line)
        if f"--join {RENDEZVOUS}" in line:
            break
    assert any("SHARDLINE_SECRET=" in line for line in lines), lines
    return read_url(head)


def generate(url: str) -> list[list[int]]:
    """Eight greedy requests at once, mixed lengths."""
    rng = random.Random(5)
    prompts = [[rng.randrange(3, 400) for _ in range(rng.randint(1, 60))] for _ in range(8)]
    body = {"prompt": prompts, "max_tokens": 20, "temperature": 0, "return_token_ids": True}
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
    response.raise_for_status()
    return [choice["token_ids"] for choice in response.json()["choices"]]


def refused(process: subprocess.Popen) -> str:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2, errors
    return errors.strip().splitlines()[-1]
