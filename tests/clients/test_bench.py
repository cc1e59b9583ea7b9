"""`shardline bench`: the figures, the load it makes, and servers that will not have it."""

import json
import random
import subprocess
import sys

import pytest
from tests.clients.bad_servers import GrpcBadServer, HttpBadServer, Refuse, Say

from shardline_client.bench.load import plan
from shardline_client.bench.options import BenchOptions
from shardline_client.bench.prompts import TextPrompts, TokenPrompts
from shardline_client.bench.records import Distribution, Outcome, Record, summarize

COMMAND = [sys.executable, "-m", "shardline_server", "bench"]
SMALL = ("--prompt-tokens", "20", "--output-tokens", "4:6")


def bench(url: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, url, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def record(start_s=0.0, times=(1.0,), outcome=Outcome.OK, num_output_tokens=None) -> Record:
    return Record(
        start_s=start_s,
        end_s=times[-1],
        outcome=outcome,
        token_times_s=tuple(times),
        num_prompt_tokens=10,
        num_output_tokens=num_output_tokens or len(times),
    )


def test_the_latencies_of_a_request():
    one = record(2.0, (3.0, 3.5, 5.0), num_output_tokens=5)
    assert (one.ttft_s, one.e2e_s) == (1.0, 3.0)
    assert one.tpot_s == (5.0 - 3.0) / 4
    assert one.itl_s == [0.5, 1.5]
    assert record(times=(1.0,)).tpot_s is None


def test_percentiles_are_interpolated():
    assert Distribution.of([]) is None
    assert Distribution.of([0.002]) == Distribution(mean=2.0, p50=2.0, p90=2.0, p99=2.0)
    hundred_and_one = [i / 1000 for i in range(101)]
    assert Distribution.of(hundred_and_one) == Distribution(
        mean=pytest.approx(50), p50=50, p90=90, p99=99
    )


def test_only_requests_that_ended_well_count():
    refused = record(times=(9.0,), outcome=Outcome.REFUSED)
    failed = record(times=(8.0,), outcome=Outcome.FAILED)
    summary = summarize([record(0.0, (1.0, 2.0)), record(1.0, (2.0, 10.0)), refused, failed])
    assert (summary.num_ok, summary.num_refused, summary.num_failed) == (2, 1, 1)
    assert summary.duration_s == 10.0
    assert summary.output_tokens_per_s == 4 / 10
    assert summary.total_tokens_per_s == 24 / 10
    assert summary.requests_per_s == 2 / 10
    assert summary.ttft_ms.mean == 1000
    assert summarize([]).requests_per_s == 0


def test_the_same_seed_plans_the_same_load():
    options = BenchOptions(rate=5, prompt_tokens=(3, 9), output_tokens=(1, 4), seed=1)
    prompts = TokenPrompts([5, 6, 7, 8])

    def planned(seed):
        requests = plan(options, prompts, random.Random(seed))
        return [next(requests) for _ in range(2000)]

    load = planned(1)
    assert load == planned(1) != planned(2)
    assert {len(request.prompt) for request in load} == set(range(3, 10))
    assert {request.num_output_tokens for request in load} == {1, 2, 3, 4}
    arrivals = [request.arrival_s for request in load]
    assert arrivals[0] == 0 and arrivals == sorted(arrivals)
    # The mean of 1999 exponential gaps is within 5 standard errors of 1/rate.
    assert arrivals[-1] / 1999 == pytest.approx(1 / 5, rel=5 / 1999**0.5)


def test_text_prompts_have_about_the_length():
    prompt = TextPrompts(0.5).make(100, random.Random(0))
    assert len(prompt.split()) == 50


def test_rate_and_concurrency_exclude_each_other():
    done = bench("http://127.0.0.1:1", "--rate", 1, "--concurrency", 2)
    assert done.returncode == 2
    assert "exclude each other" in done.stderr


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
    requests = report["requests"]
    assert len(requests) == report["summary"]["num_ok"] == 7
    assert {one["num_prompt_tokens"] for one in requests} == {20}
    assert {one["num_output_tokens"] for one in requests} <= {4, 5, 6}
    assert all(1 <= len(one["token_times_s"]) <= one["num_output_tokens"] for one in requests)
    assert report["summary"]["num_output_tokens"] == sum(
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
