"""What is said about nodes before anything is started, and what a node says that it has."""

from pathlib import Path

import pytest
from tests.server.test_cli import run

from shardline_server.errors import ConfigError
from shardline_server.node_capacity import own_capacity
from shardline_server.node_plan import plan_head
from shardline_server.settings import load_settings

TWO = {"nodes": 2, "pp": 2, "rendezvous": "127.0.0.1:1"}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"nodes": 2, "pp": 2}, "name an address of this node as rendezvous"),
        (TWO | {"rendezvous": "10.0.0.1"}, "'10.0.0.1' is not HOST:PORT"),
        (TWO | {"rendezvous": ":29500"}, "':29500' is not HOST:PORT"),
        (TWO | {"node_gpus": "4,4,4"}, "--node-gpus names 3 nodes and there are 2"),
        (TWO | {"node_gpus": "1,1", "pp": 4}, "--pp 2 would fit"),
        (TWO | {"tp": 2, "pp": 1}, "--allow-tp-across-nodes, at a cost, would fit"),
        ({"rendezvous": "127.0.0.1:1"}, "--rendezvous is about several nodes"),
        ({"node_gpus": "2"}, "--node-gpus is about several nodes"),
        ({"allow_tp_across_nodes": True}, "--allow-tp-across-nodes is about several nodes"),
    ],
)
def test_what_cannot_be_meant_is_refused(given: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan_head(load_settings({"model": "demo", **given}), None)


def test_an_interface_gives_the_address() -> None:
    host, nodes = plan_head(
        load_settings({"model": "demo", **TWO, "iface": "lo", "rendezvous": ":29500"}), None
    )
    assert host == "127.0.0.1"
    assert nodes is not None
    assert str(nodes.board) == "127.0.0.1:29500"


def test_the_rendezvous_gives_the_address() -> None:
    assert plan_head(load_settings({"model": "demo", **TWO}), None)[0] == "127.0.0.1"
    assert plan_head(load_settings({"model": "demo"}), None) == ("127.0.0.1", None)


def test_a_node_has_one_address() -> None:
    where = ("--join", "10.0.0.1:1", "--secret", "x", "--iface", "lo", "--address", "127.0.0.1")
    result = run("worker", *where)
    assert result.exit_code == 2
    assert "--iface lo and --address say the same thing" in result.output


def test_memory_of_gpus_is_what_nvidia_smi_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert own_capacity("cuda").free_bytes is None
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 81559\necho 40000\n")
    tool.chmod(0o755)
    assert own_capacity("cuda").free_bytes == 40000 * 1024**2


def test_cores_share_what_is_free() -> None:
    capacity = own_capacity("cpu")
    assert capacity.num_devices >= 1
    assert capacity.free_bytes is not None
    whole, half = capacity.bytes_per_worker(1), capacity.bytes_per_worker(2)
    assert whole is not None and half is not None
    assert abs(whole - 2 * half) <= 2
