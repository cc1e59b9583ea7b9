"""One model over two hosts, each a network namespace with an address of its own. Needs root."""

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.server.namespaces import DOOR_ADDRESS, HEAD_ADDRESS, NODE_ADDRESS, SLOW, Hosts
from tests.server.two_nodes import (
    PROMPTS,
    RENDEZVOUS,
    ended,
    generate,
    launched,
    refused,
    start_head,
    start_node,
)


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
    with hosts.faulty(SLOW), launched(hosts, tiny_model, "--pp", "2") as (head, _, url):
        assert generate(url) == tokens_of_one_process
        assert head.stderr is not None
        joined = next(line for line in head.stderr if "node 1" in line)
    round_trip = re.search(r"round trip ([\d.]+) ms", joined)
    assert round_trip is not None
    assert float(round_trip[1]) >= 10


def test_a_node_that_is_gone_as_a_whole_is_named_and_ends_its_head(
    hosts: Hosts, tiny_model: Path
) -> None:
    with launched(hosts, tiny_model, "--pp", "2") as (head, node, url):
        node.send_signal(signal.SIGKILL)
        assert re.search(r"node 1 \(.*\) has not been heard for", wait_for_failure(url))
        assert head.wait(timeout=20) == 1


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
        assert head.wait(timeout=20) == 1


def wait_for_failure(url: str) -> str:
    """Keep asking until health is 503; a request waits for the engine's news in between."""
    while (response := httpx.get(f"{url}/health", timeout=30)).status_code == 200:
        httpx.post(f"{url}/v1/completions", json={"prompt": [5], "max_tokens": 1}, timeout=60)
    return response.text


def test_a_wrong_secret(hosts: Hosts, tiny_model: Path) -> None:
    with ended(start_head(hosts, tiny_model, "--pp", "2")):
        assert "secrets of head and node differ" in refused(start_node(hosts, secret="another"))


def test_nodes_that_do_not_come_are_counted(hosts: Hosts, tiny_model: Path) -> None:
    line = refused(start_head(hosts, tiny_model, "--pp", "2", "--join-timeout", "1"))
    assert "after 1 s 0 of 1 other nodes have come (none)" in line


def test_another_model(hosts: Hosts, tiny_model: Path, tmp_path: Path) -> None:
    from tests.tiny import save_tiny

    other = save_tiny("llama", tmp_path, vocab_size=300)
    head = start_head(hosts, tiny_model, "--pp", "2")
    line = refused(start_node(hosts, "--model", str(other)))
    assert "is not the head's" in line
    assert "does not fit" in refused(head)


def test_another_version(hosts: Hosts, tiny_model: Path, tmp_path: Path) -> None:
    other = tmp_path / "transformers-9.9.9.dist-info" / "METADATA"
    other.parent.mkdir()
    other.write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 9.9.9\n")
    head = start_head(hosts, tiny_model, "--pp", "2")
    line = refused(start_node(hosts, PYTHONPATH=str(tmp_path)))
    assert re.search(r"transformers is 9\.9\.9 here and [\d.]+ on the head", line)
    assert "does not fit: transformers is 9.9.9 here" in refused(head)


def test_a_head_that_goes_before_all_have_come(hosts: Hosts, tiny_model: Path) -> None:
    head = start_head(hosts, tiny_model, "--pp", "3", "--node-gpus", "1,1,1", "--nodes", "3")
    with ended(head, start_node(hosts)) as (head, node):
        assert head.stderr is not None
        assert any("has joined" in line for line in head.stderr)
        os.killpg(head.pid, signal.SIGKILL)
        assert "the head has gone" in refused(node)


def test_no_head(hosts: Hosts) -> None:
    line = refused(start_node(hosts, "--join-timeout", "1"))
    assert f"no head answers at {RENDEZVOUS}" in line


def test_fewer_stages_than_nodes(hosts: Hosts, tiny_model: Path) -> None:
    line = refused(start_head(hosts, tiny_model, "--pp", "1"))
    assert "--pp 1 --tp 1 do not fit 2 nodes" in line
    assert "--pp 2 would fit" in line


def test_shards_over_two_nodes_say_the_same_and_their_cost_is_told(
    hosts: Hosts, tiny_model: Path, tokens_of_one_process: list[list[int]]
) -> None:
    crossing = ("--tp", "2", "--allow-tp-across-nodes")
    with launched(hosts, tiny_model, *crossing) as (head, _, url):
        before = hosts.sent_bytes()
        assert generate(url) == tokens_of_one_process
        sent_bytes = hosts.sent_bytes() - before
        head.send_signal(signal.SIGTERM)
        _, log = head.communicate(timeout=20)
    token_bytes = 2 * 3 * 36 * 4  # sums of 3 layers, values of fp32, one other rank
    warning = "shards of stage 0 lie on several nodes: each token costs every rank 0.8 KiB in 6 rou"
    assert warning in log
    num_tokens = sum(map(len, PROMPTS)) + sum(len(t) - 1 for t in tokens_of_one_process)
    assert sent_bytes >= num_tokens * token_bytes


@pytest.fixture(scope="module")
def uneven(hosts: Hosts, tiny_model: Path) -> Iterator[tuple[subprocess.Popen, str]]:
    """A launch that goes on during several tests: one stage on the head, two on the other node."""
    options = ("--pp", "3", "--node-gpus", "1,2")
    with launched(hosts, tiny_model, *options, port=29600) as (_, node, url):
        yield node, url


def test_nodes_run_as_many_workers_as_they_may(
    uneven: tuple[subprocess.Popen, str], tokens_of_one_process: list[list[int]]
) -> None:
    node, url = uneven
    assert generate(url) == tokens_of_one_process
    assert node.stderr is not None
    joined = next(line for line in node.stderr if "joined as 1" in line)
    assert "runs stage 1, tp rank 0, stage 2, tp rank 0" in joined


def test_no_connection_between_workers_waits_for_the_first_request(
    hosts: Hosts, uneven: tuple[subprocess.Popen, str]
) -> None:
    before = [hosts.connections(namespace) for namespace in (hosts.head, hosts.node)]
    generate(uneven[1])
    assert [hosts.connections(namespace) for namespace in (hosts.head, hosts.node)] == before


def test_one_node_too_many(hosts: Hosts, uneven: tuple[subprocess.Popen, str]) -> None:
    assert "this one is too many" in refused(start_node(hosts, port=29600))


def test_a_taken_rendezvous_port(
    hosts: Hosts, tiny_model: Path, uneven: tuple[subprocess.Popen, str]
) -> None:
    line = refused(start_head(hosts, tiny_model, "--pp", "2", port=29600))
    assert f"--rendezvous {HEAD_ADDRESS}:29600 cannot be opened" in line


def test_every_process_listens_at_its_nodes_address_and_no_other(
    hosts: Hosts, uneven: tuple[subprocess.Popen, str]
) -> None:
    """Doors are at the address that --host names."""
    at_head, at_node = hosts.listening(hosts.head), hosts.listening(hosts.node)
    assert at_head == {HEAD_ADDRESS, DOOR_ADDRESS}
    assert at_node == {NODE_ADDRESS}
