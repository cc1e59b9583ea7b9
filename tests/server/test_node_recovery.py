"""Workers of either node die, and streams go on as if nothing had been. Needs root."""

import asyncio
import contextlib
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
from tests.server.chaos import run as run_chaos
from tests.server.namespaces import Hosts
from tests.server.streams import Said, read_streams
from tests.server.two_nodes import launched

SPLITS = {
    "1x3": ("--pp", "3", "--node-gpus", "1,2"),  # one stage on the head, two on the other node
    "2x2": ("--tp", "2", "--pp", "2"),
}


@dataclass(frozen=True)
class Launch:
    """A launch that goes on during several tests, and what its streams say if left alone."""

    head: subprocess.Popen[str]
    node: subprocess.Popen[str]
    doors: tuple[str, str]
    undisturbed: list[Said]


@pytest.fixture(scope="module", params=SPLITS)
def launch(request: pytest.FixtureRequest, hosts: Hosts, tiny_model: Path) -> Iterator[Launch]:
    with launched(hosts, tiny_model, *SPLITS[request.param], port=29700) as (head, node, http):
        doors = (http, f"grpc://{head.stdout.readline().split()[-1]}")
        undisturbed = read_streams(doors[::-1], lambda: None)
        assert {said.finish_reason for said in undisturbed} == {"length", "stop"}
        yield Launch(head, node, doors, undisturbed)


def workers_of(node: subprocess.Popen[str]) -> dict[str, psutil.Process]:
    """By what `ps` calls them."""
    found = {}
    for child in psutil.Process(node.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            name = " ".join(child.cmdline())
            if "shardline: worker" in name:
                found[name.strip()] = child
    return found


def read_disturbed(launch: Launch, disturb: Callable[[], None]) -> list[Said]:
    """Each stream over the other door than what it is compared with."""
    return read_streams(launch.doors, disturb)


def last_loss(launch: Launch) -> str:
    return httpx.get(f"{launch.doors[0]}/health", timeout=30).json()["last_loss"]


@pytest.mark.parametrize(
    ("where", "victims"),
    [("node", slice(1)), ("node", slice(None)), ("head", slice(-1, None)), ("head", slice(None))],
    ids=["the node's first", "all of the node", "the head's last", "all of the head"],
)
def test_streams_outlive_workers(launch: Launch, where: str, victims: slice) -> None:
    process = launch.node if where == "node" else launch.head
    before = workers_of(process)
    names = [name for name in sorted(before) if "stage" in name]

    def kill() -> None:
        for name in names[victims]:
            before[name].kill()

    assert read_disturbed(launch, kill) == launch.undisturbed
    after = workers_of(process)
    assert [name for name in names if after[name] != before[name]] == names[victims]
    node = r" on node 1 \(.*\)" if where == "node" else ""
    how = rf"the worker of stage \d, tp rank \d{node} was killed by signal 9, at step"
    assert re.search(how, last_loss(launch).replace("idle after step", "at step"))


def test_a_stopped_worker_of_another_node_is_held_dead_and_replaced(launch: Launch) -> None:
    workers = workers_of(launch.node)
    stopped = workers[last := max(workers)]
    assert read_disturbed(launch, stopped.suspend) == launch.undisturbed
    assert workers_of(launch.node)[last] != stopped
    stage, tp = re.findall(r"=(\d)", last)
    assert f"held dead: stage {stage}, tp rank {tp}" in last_loss(launch)


def test_streams_outlive_a_cut_wire(hosts: Hosts, launch: Launch) -> None:
    def cut() -> None:
        with hosts.cut():
            time.sleep(2)

    assert read_disturbed(launch, cut) == launch.undisturbed


def test_the_other_node_has_a_spare_process_too(launch: Launch) -> None:
    while "shardline: worker" not in workers_of(launch.node):
        time.sleep(0.1)


def test_a_minute_of_chaos_over_two_hosts(hosts: Hosts, tiny_model: Path) -> None:
    chaos = asyncio.run(run_chaos(tiny_model, seconds=60, seed=2, hosts=hosts))
    assert chaos.troubles["killed"]
    assert any(name.startswith("wire ") for name in chaos.troubles)
