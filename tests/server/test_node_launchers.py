"""The same command on every node, started by torchrun and by SLURM's srun."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.server.namespaces import HEAD_ADDRESS, NODE_ADDRESS, Hosts
from tests.server.two_nodes import (
    HEAD_OPTIONS,
    PYTHON,
    ended,
    generate,
    read_url,
    refused,
    start,
)

from shardline_server.engine_config import BoardAddress
from shardline_server.errors import ConfigError
from shardline_server.node_launchers import find_launch

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "7",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29400",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "WORLD_SIZE": "2",
}
# As srun's manual page lists them, for the second of two tasks.
SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "1",
}


def test_what_torchrun_says() -> None:
    launch = find_launch(TORCHRUN)
    assert launch is not None
    assert (launch.launcher, launch.num_nodes, launch.node_index) == ("torchrun", 2, 1)
    assert launch.board == BoardAddress(
        host="10.0.0.1", port=29400, prefix="shardline/7/0", is_kept_by_launcher=True
    )


def test_what_srun_says() -> None:
    launch = find_launch(SRUN)
    assert launch is not None
    assert (launch.launcher, launch.num_nodes, launch.node_index) == ("srun", 2, 1)
    assert launch.board == BoardAddress(host="gpu07", port=24713)
    reserved = find_launch(SRUN | {"SLURM_STEP_RESV_PORTS": "12007-12008"})
    assert reserved is not None
    assert reserved.board.port == 12007


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu4", "gpu1"),
        ("rack2-gpu[007,010-012].site,login", "rack2-gpu007.site"),
        ("10.0.0.1", "10.0.0.1"),
    ],
)
def test_the_first_of_a_host_list(nodes: str, first: str) -> None:
    launch = find_launch(SRUN | {"SLURM_STEP_NODELIST": nodes})
    assert launch is not None
    assert launch.board.host == first


def test_one_process_is_no_launch() -> None:
    one = {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1"}
    batch_script = {key: value for key, value in SRUN.items() if "STEP" not in key}
    alone = TORCHRUN | {"GROUP_WORLD_SIZE": "1", "WORLD_SIZE": "1"}
    for environment in ({}, SRUN | one, batch_script, alone, SRUN | alone):
        assert find_launch(environment) is None


@pytest.mark.parametrize(
    ("environment", "remedy"),
    [
        (TORCHRUN | {"WORLD_SIZE": "8"}, "8 processes on 2 nodes.*torchrun --nproc-per-node 1"),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "4"}, "4 processes on 2 nodes.*srun --ntasks-per-node 1"),
    ],
)
def test_more_processes_than_nodes_are_refused(environment: dict[str, str], remedy: str) -> None:
    with pytest.raises(ConfigError, match=remedy):
        find_launch(environment)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (TORCHRUN | {"GROUP_RANK": "first"}, "'first'"),
        ({"SLURM_STEP_ID": "0"}, "SLURM_STEP_NUM_NODES"),
    ],
)
def test_variables_that_are_wrong_or_missing_are_named(environment, words) -> None:
    with pytest.raises(ConfigError, match=words):
        find_launch(environment)


def start_by_torchrun(hosts: Hosts, model: Path, index: int) -> subprocess.Popen:
    meet = ("--master-addr", HEAD_ADDRESS, "--master-port", "29400", "--node-rank", str(index))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", *meet]
    command = [*torchrun, "--no-python", *PYTHON, "serve", str(model), "--pp", "2", *HEAD_OPTIONS]
    return start(hosts, (hosts.head, hosts.node)[index], *command)


def test_torchrun_starts_both_nodes(
    hosts: Hosts, tiny_model: Path, tokens_of_one_process: list[list[int]]
) -> None:
    both = [start_by_torchrun(hosts, tiny_model, index) for index in (0, 1)]
    with ended(*both) as (head, node):
        assert generate(read_url(head)) == tokens_of_one_process
        head.send_signal(signal.SIGTERM)
        head.wait(timeout=30)
        assert node.wait(timeout=30) == 0


def start_task(
    hosts: Hosts, model: Path, index: int, *options: str, **variables: str
) -> subprocess.Popen:
    """Task `index` of a step of SLURM on both hosts."""
    task = {"SLURM_NODEID": str(index), "SLURM_PROCID": str(index)}
    step = SRUN | {"SLURM_STEP_NODELIST": f"{HEAD_ADDRESS},{NODE_ADDRESS}"} | task | variables
    command = [*PYTHON, "serve", str(model), "--pp", "2", *HEAD_OPTIONS, *options]
    return start(hosts, (hosts.head, hosts.node)[index], *command, **step)


def test_srun_starts_both_nodes(
    hosts: Hosts, tiny_model: Path, tokens_of_one_process: list[list[int]]
) -> None:
    with ended(start_task(hosts, tiny_model, 0), start_task(hosts, tiny_model, 1)) as (head, node):
        assert generate(read_url(head)) == tokens_of_one_process
        assert "node 1 has joined already" in refused(start_task(hosts, tiny_model, 1))
        head.send_signal(signal.SIGTERM)
        assert head.wait(timeout=20) == 0
        assert node.wait(timeout=20) == 0


def test_nodes_that_were_started_with_other_settings(hosts: Hosts, tiny_model: Path) -> None:
    node = start_task(hosts, tiny_model, 1, "--dtype", "bfloat16")
    with ended(start_task(hosts, tiny_model, 0), node) as (head, node):
        assert "dtype is bfloat16 here and float32 on the head" in refused(node)
        assert "does not fit: dtype is bfloat16 here" in refused(head)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--nodes", "3"), "--nodes is 3 and srun has started 2"),
        (("--iface", "lo", "--rendezvous", ":29500"), "':29500' is not HOST:PORT"),
        (("--pp", "1"), "--pp 1 --tp 1 do not fit 2 nodes"),
    ],
)
def test_a_launch_that_cannot_be_meant(options, reason, tiny_model, monkeypatch) -> None:
    refuse(tiny_model, ("--pp", "2", *options), reason, monkeypatch, SHARDLINE_SECRET="x")


def test_a_launch_without_a_secret(tiny_model, monkeypatch) -> None:
    refuse(tiny_model, ("--pp", "2"), "set SHARDLINE_SECRET to the same text", monkeypatch)


def refuse(model: Path, options, reason: str, monkeypatch, **variables: str) -> None:
    from tests.server.test_cli import run

    for name, value in (SRUN | variables).items():
        monkeypatch.setenv(name, value)
    result = run("serve", str(model), *options)
    assert result.exit_code == 2
    assert reason in result.output
