"""A worker is lost before the first request can come: nobody waits, so the server ends, and says
which one and why. Whoever has started it may start it again.
"""

import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from tests.server.namespaces import Hosts
from tests.server.test_serve import start
from tests.server.two_nodes import ended, start_head, start_node


def await_worker(process: subprocess.Popen[str], name: str) -> psutil.Process:
    """One of its workers, as soon as it calls itself that."""
    while True:
        for child in psutil.Process(process.pid).children(recursive=True):
            try:
                if " ".join(child.cmdline()).strip() == f"shardline: {name}":
                    return child
            except psutil.NoSuchProcess:
                continue  # what measures layers has just ended


def rank_of(worker: psutil.Process) -> int:
    """Workers are started in the order of their ranks, and may be named in any other."""
    return sorted(one.pid for one in psutil.Process(worker.ppid()).children()).index(worker.pid)


def last_words(process: subprocess.Popen[str]) -> str:
    """Why it ends, as it says: it has status 1, and no child any more."""
    children = psutil.Process(process.pid).children(recursive=True)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    assert "Traceback" not in errors
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    return next(line for line in errors.splitlines() if "The server ends: " in line)


@pytest.mark.parametrize("name", ["worker", "worker stage=0 tp=0", "worker stage=1 tp=1"])
def test_a_worker_dies(tiny_model: Path, name: str) -> None:
    """While it imports torch, and once it has been told what to load."""
    options = ("--pp", "2", "--tp", "2", "--dtype", "float32")
    with ended(start(tiny_model, *options, start_new_session=True)) as (process,):
        worker = await_worker(process, name)
        stage, tp_rank = divmod(rank_of(worker), 2)
        worker.kill()
        line = last_words(process)
    assert f"the worker of stage {stage}, tp rank {tp_rank} was killed by signal 9, " in line


def test_a_worker_is_stopped(tiny_model: Path) -> None:
    with ended(start(tiny_model, "--pp", "2", start_new_session=True)) as (process,):
        await_worker(process, "worker stage=1 tp=0").suspend()
        line = last_words(process)
    assert "held dead: stage 1, tp rank 0" in line


@pytest.mark.parametrize("act", [psutil.Process.kill, psutil.Process.suspend])
def test_a_worker_is_lost_while_steps_are_measured(
    tiny_model: Path, act: Callable[[psutil.Process], None]
) -> None:
    options = ("--pp", "2", "--log-level", "info", "--measure-seconds", "600")
    with ended(start(tiny_model, *options, start_new_session=True)) as (process,):
        assert process.stderr is not None
        assert any("measuring step times" in line for line in process.stderr)
        act(await_worker(process, "worker stage=1 tp=0"))
        line = last_words(process)
    assert "while step times were measured" in line
    assert "stage 1, tp rank 0" in line


@pytest.mark.parametrize("act", [psutil.Process.kill, psutil.Process.suspend])
def test_a_worker_of_another_node(
    hosts: Hosts, tiny_model: Path, act: Callable[[psutil.Process], None]
) -> None:
    head = start_head(hosts, tiny_model, "--pp", "2", "--measure-seconds", "60")
    with ended(head, start_node(hosts)) as (head, node):
        act(await_worker(node, "worker stage=1 tp=0"))
        line = last_words(head)
        assert node.wait(timeout=30) == 0
    how = "was killed by signal 9" if act is psutil.Process.kill else "held dead"
    assert "stage 1, tp rank 0" in line
    assert how in line
