"""`shardline bench` as a process: before real servers, and before some that will not have it."""

import json
import subprocess
import sys
import threading

import pytest
from tests.clients.bad_servers import GrpcBadServer, HttpBadServer, Refuse, Say, SayTogether

from shardline_client.bench.load import plan
from shardline_client.bench.options import BenchOptions
from shardline_client.bench.prompts import TokenPrompts

COMMAND = [sys.executable, "-m", "shardline_server", "bench"]
SMALL = ("--prompt-tokens", "20", "--output-tokens", "4:6")


def bench(url: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, url, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_options_that_exclude_each_other_are_refused():
    done = bench("http://127.0.0.1:1", "--rate", 1, "--concurrency", 2)
    assert done.returncode == 2
    assert "--concurrency excludes --rate" in done.stderr


@pytest.mark.parametrize("load", [("--concurrency", 3), ("--rate", 50)])
def test_a_run_over_each_door(url, tmp_path, load):
    files = ("--json", tmp_path / "run.json", "--png", tmp_path / "run.png")
    done = bench(url, *SMALL, "--num-requests", 7, "--seed", 4, *load, *files)
    assert done.returncode == 0, done.stderr
    assert "7 ok, 0 refused, 0 failed" in done.stdout
    for name in ("TTFT", "TPOT", "ITL", "E2E"):
        assert name in done.stdout
    report = json.loads((tmp_path / "run.json").read_text())
    assert report["server"]["prompts"] == "token ids"
    assert report["server"]["options"]["ignore_eos"] is True
    requests, (point,) = report["requests"], report["points"]
    assert len(requests) == point["summary"]["num_ok"] == 7
    assert {one["num_prompt_tokens"] for one in requests} == {20}
    assert {one["num_output_tokens"] for one in requests} <= {4, 5, 6}
    assert all(sum(one["token_counts"]) == one["num_output_tokens"] for one in requests)
    assert all(len(one["token_counts"]) == len(one["token_times_s"]) for one in requests)
    assert point["summary"]["num_output_tokens"] == sum(
        one["num_output_tokens"] for one in requests
    )
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_chat_and_duration(server, tmp_path):
    """A duration ends the run by itself, after at least one request."""
    arguments = ("--chat", "--duration", 0.2, "--json", tmp_path / "run.json")
    done = bench(server["http"], *SMALL, *arguments)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run.json").read_text())
    assert report["server"]["prompts"] == "text"
    assert all(one["start_s"] < 0.2 for one in report["requests"])


def test_another_server_gets_only_openais_fields():
    with HttpBadServer() as server:
        server.answers = [Say(4)]
        done = bench(server.url, *SMALL, "--num-requests", 2)
    assert done.returncode == 0, done.stderr
    assert "2 ok" in done.stdout
    openai = {"model", "prompt", "max_tokens", "temperature", "stream", "stream_options"}
    assert all(set(body) <= openai for body in server.bodies)
    assert isinstance(server.bodies[-1]["prompt"], str)


@pytest.mark.parametrize("kind", [HttpBadServer, GrpcBadServer])
def test_a_server_that_refuses_everything(kind):
    with kind() as server:
        server.answers = [Refuse("full", "60")]
        done = bench(server.url, *SMALL, "--num-requests", 3, "--concurrency", 2)
    assert done.returncode == 1
    assert "0 ok, 3 refused, 0 failed" in done.stdout
    assert "3 x Overloaded: I am full." in done.stdout
    assert "TTFT" not in done.stdout


def test_some_refusals_and_failures_are_counted():
    with GrpcBadServer() as server:
        warm_up = Say(4)
        server.answers = [warm_up, Refuse("full"), Say(2, then="error"), Refuse("failed"), Say(4)]
        done = bench(server.url, *SMALL, "--num-requests", 5)
    assert done.returncode == 0
    assert "2 ok, 1 refused, 2 failed" in done.stdout
    assert "StreamBroken: The engine died." in done.stdout


def test_nobody_there():
    done = bench("http://127.0.0.1:1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: ")


def test_without_matplotlib_a_chart_is_refused_before_the_load(tmp_path):
    script = (
        "import sys, importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name: None if name == 'matplotlib' else find(name)\n"
        "from shardline_client.command_line import main\n"
        f"main(['bench', 'http://127.0.0.1:1', '--png', {str(tmp_path / 'x.png')!r}])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert "needs matplotlib: pip install 'shardline[bench]'" in done.stderr


def test_an_open_loop_does_not_wait_for_answers():
    """The server answers nobody until all six are there."""
    with HttpBadServer() as server:
        warm_up = [Say(1)] * 3  # two of them calibrate prompts
        server.answers = [*warm_up, SayTogether(threading.Barrier(6))]
        done = bench(server.url, *SMALL, "--num-requests", 6, "--rate", 100)
    assert done.returncode == 0, done.stderr
    assert "6 ok" in done.stdout


def test_a_refusal_is_no_success(tmp_path):
    with HttpBadServer() as server:
        warm_up = [Say(1)] * 3
        server.answers = [*warm_up, Say(2), Refuse("full", "7"), Say(2), Refuse("full")]
        arguments = ("--rate", 100, "--num-requests", 5, "--budget", "standard:deadline=60000")
        done = bench(server.url, *SMALL, *arguments, "--json", tmp_path / "run.json")
    assert done.returncode == 0, done.stderr
    assert "2 ok, 3 refused, 0 failed" in done.stdout
    assert "1 of 3 refusals said when to come back: after 7.0 s (p50)" in done.stdout
    report = json.loads((tmp_path / "run.json").read_text())
    budget = report["points"][0]["summary"]["budget"]
    assert (budget["num_offered"], budget["num_refused"], budget["num_met"]) == (5, 3, 2)
    assert (budget["attainment"], budget["admitted_attainment"]) == (0.4, 1.0)
    assert report["points"][0]["summary"]["refusal_ms"]["p99"] > 0
    assert [one["met"] for one in report["requests"]].count(True) == 2
    assert not any("latency_budget" in body for body in server.bodies)


@pytest.mark.parametrize(
    ("owner", "arguments", "is_sent"),
    [
        ("shardline", (), True),
        ("shardline", ("--no-send-budget",), False),
        ("somebody", (), False),
        ("somebody", ("--send-budget",), True),
    ],
)
def test_budgets_are_sent_to_our_servers_or_when_asked(owner, arguments, is_sent):
    budget = ("--budget", "interactive:ttft=1500,tpot=100")
    with HttpBadServer() as server:
        server.owner = owner
        done = bench(server.url, *SMALL, "--num-requests", 1, *budget, *arguments)
    assert done.returncode == 0, done.stderr
    *warm_up, counted = server.bodies
    asked = {"ttft_ms": 1500, "tpot_ms": 100, "priority": "interactive", "on_miss": "reject"}
    assert counted.get("latency_budget") == (asked if is_sent else None)
    assert not any("latency_budget" in body for body in warm_up)


def test_arrivals_are_when_sending_was_due_and_the_ends_are_not_counted(tmp_path):
    arguments = ("--rate", 200, "--cv", 2, "--num-requests", 40, "--num-seeds", 2, "--seed", 5)
    ends = ("--warm-up", 0.05, "--cool-down", 0.05)
    with HttpBadServer() as server:
        done = bench(server.url, *SMALL, *arguments, *ends, "--json", tmp_path / "run.json")
    assert done.returncode == 0, done.stderr
    requests = json.loads((tmp_path / "run.json").read_text())["requests"]
    options = BenchOptions(rates=(200,), cv=2, seed=5)
    for seed in (5, 6):
        planned = plan(options, TokenPrompts([1]), seed, rate=200)
        arrivals = [next(planned).arrival_s for _ in range(41)]
        counted = [at for at in arrivals[:40] if 0.05 <= at < arrivals[40] - 0.05]
        sent = sorted(one["start_s"] for one in requests if one["seed"] == seed)
        assert sent == [pytest.approx(at, abs=1e-6) for at in counted]
        assert 0 < len(counted) < 40


def test_nothing_left_to_count_is_told():
    with HttpBadServer() as server:
        done = bench(server.url, "--rate", 100, "--num-requests", 2, "--warm-up", 60)
    assert done.returncode == 2
    assert "leave nothing of" in done.stderr


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (Say(1), "256 requests/s"),
        (Refuse("full"), "below all that was tried, not at 0.00391/s"),
    ],
)
def test_capacity_of_a_server_that_takes_all_or_nothing(tmp_path, answer, found):
    arguments = ("--num-requests", 1, "--find-capacity", "--budget", "standard:deadline=60000")
    with HttpBadServer() as server:
        server.answers = [answer]
        files = ("--json", tmp_path / "run.json", "--png", tmp_path / "run.png")
        done = bench(server.url, *SMALL, *arguments, *files)
    assert done.returncode == isinstance(answer, Refuse), done.stderr
    assert f"capacity at 99% in time: {found}" in done.stdout
    report = json.loads((tmp_path / "run.json").read_text())
    assert [one["target"] for one in report["capacities"]] == [0.99, 0.9]
    assert len(report["points"]) == 9
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_a_trace_is_replayed_with_its_lengths(server, tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,40,8\n"
        "2023-11-16 18:15:56.6805900,20,4\n"
        "2023-11-16 18:15:51.6805900,10,6\n"
    )
    scale = ("--time-scale", 0.01, "--length-scale", 0.5)
    budgets = ("--budget", "standard:share=0.5", "--budget", "batch:share=0.5")
    arguments = ("--trace", trace, *scale, *budgets, "--json", tmp_path / "run.json")
    done = bench(server["http"], *arguments)
    assert done.returncode == 0, done.stderr
    requests = json.loads((tmp_path / "run.json").read_text())["requests"]
    sent = sorted(
        (one["start_s"], one["num_prompt_tokens"], one["num_output_tokens"]) for one in requests
    )
    assert sent == [(0.0, 20, 4), (0.05, 5, 3), (0.1, 10, 2)]
    assert all(one["met"] is one["is_told_met"] is True for one in requests)
    assert all(one["told_ttft_ms"] > 0 for one in requests)
    assert "The server says the same of 3 of 3 budgets" in done.stdout
