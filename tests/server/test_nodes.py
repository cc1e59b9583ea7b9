"""One model over two hosts, each a network namespace with an address of its own. Needs root."""

import json
import signal
from pathlib import Path

import httpx
import pytest
from tests.server.namespaces import Hosts
from tests.server.two_nodes import (
    RENDEZVOUS,
    generate,
    launched,
    refused,
    start_head,
    start_node,
)

from shardline_shards.layout import ParallelLayout


@pytest.mark.parametrize("tp", [1, 2])
def test_two_nodes_say_what_one_process_says_and_leave_together(
    hosts: Hosts, tiny_model: Path, tokens_of_one_process: list[list[int]], tp: int
) -> None:
    with launched(hosts, tiny_model, "--pp", "2", "--tp", str(tp)) as (head, node, url):
        assert generate(url) == tokens_of_one_process
        head.send_signal(signal.SIGTERM)
        assert head.wait(timeout=20) == 0
        assert node.wait(timeout=20) == 0


def test_a_slow_wire_changes_no_token(
    hosts: Hosts, tiny_model: Path, tokens_of_one_process: list[list[int]]
) -> None:
    hosts.narrow()
    try:
        with launched(hosts, tiny_model, "--pp", "2") as (_, _, url):
            assert generate(url) == tokens_of_one_process
    finally:
        hosts.widen()


def test_a_lost_node_is_named_and_its_head_says_so(hosts: Hosts, tiny_model: Path) -> None:
    with launched(hosts, tiny_model, "--pp", "2") as (_, node, url):
        node.send_signal(signal.SIGKILL)
        reason = wait_for_failure(url)
        assert "node 1 (" in reason or "stage 1" in reason


def test_a_cut_wire_ends_streams_on_both_sides(hosts: Hosts, tiny_model: Path) -> None:
    with launched(hosts, tiny_model, "--pp", "2") as (head, node, url):
        body = {"prompt": [5, 6, 7], "max_tokens": 450, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            with hosts.cut():
                last = [line for line in lines if line][-1]
                assert node.wait(timeout=30) == 1
        assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
        assert "has not been heard for" in wait_for_failure(url)
        head.send_signal(signal.SIGTERM)
        assert head.wait(timeout=20) == 0


def wait_for_failure(url: str) -> str:
    """Keep asking until health is 503; a request waits for the engine's news in between."""
    while (response := httpx.get(f"{url}/health", timeout=30)).status_code == 200:
        httpx.post(f"{url}/v1/completions", json={"prompt": [5], "max_tokens": 1}, timeout=60)
    return response.text


def test_a_wrong_secret(hosts: Hosts, tiny_model: Path) -> None:
    head = start_head(hosts, tiny_model, "--pp", "2", "--join-timeout", "20")
    assert "secrets of head and node differ" in refused(start_node(hosts, secret="another"))
    assert "0 of 1 other nodes have come" in refused(head)


def test_another_model(hosts: Hosts, tiny_model: Path, tmp_path: Path) -> None:
    from tests.tiny import save_tiny

    other = save_tiny("llama", tmp_path, vocab_size=300)
    head = start_head(hosts, tiny_model, "--pp", "2")
    line = refused(start_node(hosts, "--model", str(other)))
    assert "is not the head's" in line
    assert "does not fit" in refused(head)


def test_no_head(hosts: Hosts) -> None:
    line = refused(start_node(hosts, "--join-timeout", "1"))
    assert f"no head answers at {RENDEZVOUS}" in line


def test_one_node_too_many(hosts: Hosts, tiny_model: Path) -> None:
    with launched(hosts, tiny_model, "--pp", "2"):
        assert "this one is too many" in refused(start_node(hosts))


def test_fewer_stages_than_nodes(hosts: Hosts, tiny_model: Path) -> None:
    line = refused(start_head(hosts, tiny_model, "--pp", "1"))
    assert "2 nodes need as many stages and pp is 1" in line
    assert "--pp 2 would fit" in line


def test_a_taken_rendezvous_port(hosts: Hosts, tiny_model: Path) -> None:
    with launched(hosts, tiny_model, "--pp", "2"):
        assert f"--rendezvous {RENDEZVOUS} cannot be opened" in refused(
            start_head(hosts, tiny_model, "--pp", "2")
        )


def test_stages_are_dealt_node_by_node() -> None:
    layout = ParallelLayout(tp=2, stage_layers=(1, 1, 1))
    from shardline_server.head import stages_of_nodes

    assert stages_of_nodes(layout, 2) == [range(0, 2), range(2, 3)]
