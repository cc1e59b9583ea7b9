"""A signal to a whole group of processes, as by Ctrl-C in a terminal or `kill -- -PGID`.

The front end alone follows it; engine and workers go on until it has let requests finish.
"""

import os
import signal
from pathlib import Path

import httpx
import psutil
import pytest
from tests.engine_process import engine_config
from tests.server.namespaces import Hosts
from tests.server.test_serve import LONG, read_url, start
from tests.server.two_nodes import launched

from shardline_server.child import (
    configure_child_process,
    prepare_child_process,
    stop_child_processes,
)
from shardline_shards.layout import ParallelLayout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_running_streams_finish(tiny_model: Path, number: signal.Signals) -> None:
    options = ("--tp", "2", "--dtype", "float32", "--grace-s", "60")
    process = start(tiny_model, *options, start_new_session=True)
    try:
        url = read_url(process)
        family = psutil.Process(process.pid).children(recursive=True)
        body = LONG | {"n": 4}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            next(lines := response.iter_lines())
            os.killpg(process.pid, number)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive


def test_a_child_that_has_not_begun_goes_on(tiny_model: Path) -> None:
    """By default these signals end it, and Python takes a while to begin. Its parent can."""
    process = prepare_child_process("shardline_server.engine")
    for number in (signal.SIGTERM, signal.SIGINT):
        process.send_signal(number)
    try:
        config = engine_config(tiny_model, ParallelLayout(tp=1, stage_layers=(3,)))
        configure_child_process(process, config)
        assert process.stdout is not None
        assert b"address" in process.stdout.readline()
    finally:
        process.kill()
        stop_child_processes([process])
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("told", ["head", "node", "head and node"])
def test_running_streams_of_a_launch_finish(hosts: Hosts, tiny_model: Path, told: str) -> None:
    """All processes of a host get the signal; the other host leaves with it."""
    options = ("--pp", "2", "--grace-s", "60")
    with launched(hosts, tiny_model, *options) as (head, node, url):
        with httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=60) as response:
            next(lines := response.iter_lines())
            for name, process in (("head", head), ("node", node)):
                if name in told:
                    os.killpg(process.pid, signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert head.wait(timeout=30) == 0
        assert node.wait(timeout=30) == 0
