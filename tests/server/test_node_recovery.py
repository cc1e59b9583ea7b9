"""Workers of another node die, and streams go on as if nothing had been. Needs root."""

import asyncio
import contextlib
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from tests.server.chaos import run as run_chaos
from tests.server.namespaces import Hosts
from tests.server.two_nodes import launched

from shardline_client import Client

NUM_STREAMS = 16
OPTIONS = {"max_tokens": 200, "ignore_eos": True}
Launch = tuple[subprocess.Popen[str], str]


@pytest.fixture(scope="module")
def launch(hosts: Hosts, tiny_model: Path) -> Iterator[Launch]:
    """One stage on the head, two on the other node."""
    options = ("--pp", "3", "--node-gpus", "1,2")
    with launched(hosts, tiny_model, *options, port=29700) as (_, node, url):
        yield node, url


def workers_of(node: subprocess.Popen[str]) -> dict[str, psutil.Process]:
    """By what `ps` calls them."""
    found = {}
    for child in psutil.Process(node.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            name = " ".join(child.cmdline())
            if "shardline: worker" in name:
                found[name.strip()] = child
    return found


def read_streams(url: str, disturb: Callable[[], None]) -> list[str]:
    """What all streams say; `disturb` is called once each has begun."""
    begun = threading.Barrier(NUM_STREAMS + 1, timeout=60)

    def read(client: Client, seed: int) -> str:
        with client.stream_complete("The", seed=seed, **OPTIONS) as stream:
            next(pieces := iter(stream))
            begun.wait()
            for _ in pieces:
                pass
            assert stream.completion.finish_reason == "length"
            return stream.completion.text

    with Client(url, timeout_s=120) as client, ThreadPoolExecutor(NUM_STREAMS) as threads:
        streams = [threads.submit(read, client, seed) for seed in range(NUM_STREAMS)]
        begun.wait()
        disturb()
        return [stream.result() for stream in streams]


@pytest.mark.parametrize("stages", [(1,), (1, 2)], ids=["one", "all"])
def test_streams_outlive_workers_of_another_node(launch: Launch, stages: tuple[int, ...]) -> None:
    node, url = launch
    undisturbed = read_streams(url, lambda: None)

    def disturb() -> None:
        for name, worker in workers_of(node).items():
            if any(f"stage={stage} " in name for stage in stages):
                worker.kill()

    before = workers_of(node)
    assert read_streams(url, disturb) == undisturbed
    after = workers_of(node)
    assert {n for n in before if before[n] != after.get(n) and "stage" in n} == {
        f"shardline: worker stage={stage} tp=0" for stage in stages
    }
    last_loss = httpx.get(f"{url}/health", timeout=30).json()["last_loss"]
    how = r"the worker of stage [12], tp rank 0 on node 1 \(.*\) was killed by signal 9, at step"
    assert re.search(how, last_loss.replace("idle after step", "at step"))


def test_a_stopped_worker_of_another_node_is_held_dead_and_replaced(launch: Launch) -> None:
    node, url = launch
    undisturbed = read_streams(url, lambda: None)
    stopped = workers_of(node)[last := "shardline: worker stage=2 tp=0"]
    assert read_streams(url, stopped.suspend) == undisturbed
    assert workers_of(node)[last] != stopped
    reason = "held dead: stage 2, tp rank 0"
    assert reason in httpx.get(f"{url}/health", timeout=30).json()["last_loss"]


def test_the_other_node_has_a_spare_process_too(launch: Launch) -> None:
    node, _ = launch
    while "shardline: worker" not in workers_of(node):
        time.sleep(0.1)


def test_half_a_minute_of_chaos_over_two_hosts(hosts: Hosts, tiny_model: Path) -> None:
    chaos = asyncio.run(run_chaos(tiny_model, seconds=30, seed=2, hosts=hosts))
    assert chaos.troubles["killed"]
    assert chaos.troubles["cuts"]
