"""Latency budgets through the clients: asked for, told about, refused; over both doors alike."""

import subprocess
import sys

import pytest
from tests.server.peer import delta, echo, judged

from shardline_client import (
    BudgetImpossible,
    BudgetOutcome,
    BudgetUnmet,
    Client,
    DeadlineMissed,
    InvalidRequest,
    Overloaded,
    RequestTimeout,
    Retry,
    StreamBroken,
)
from shardline_scheduler import budget as wire
from shardline_server.messages import FinishReason, Refusal

ASKED = {"ttft_ms": 500.0, "deadline_ms": 9000.0, "priority": "batch", "on_miss": "degrade"}
BUDGET = wire.LatencyBudget(
    ttft_ms=500, deadline_ms=9000, priority=wire.Priority.BATCH, on_miss=wire.OnMiss.DEGRADE
)
REFUSAL = Refusal(
    retry_after_s=0.25, asked=BUDGET, predicted=wire.BudgetPrediction(ttft_ms=812.5, e2e_ms=900)
)
MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def client(make_client, frontend_url):
    return make_client(frontend_url, api_key="right", retry=Retry(base_s=0.001))


def refuse(code, num_tokens=0):
    def script(submit):
        return [
            *(delta(submit.request_id, i, [300]) for i in range(num_tokens)),
            delta(
                submit.request_id,
                num_tokens,
                finish_reason=FinishReason.ERROR,
                error_code=code,
                error_message="it is so",
                refusal=REFUSAL,
            ),
        ]

    return script


def test_every_method_asks_for_it(client, peer):
    client.complete("the", latency_budget=ASKED)
    client.chat(MESSAGES, latency_budget=ASKED)
    client.read_complete("the", latency_budget=ASKED)
    client.read_chat(MESSAGES, latency_budget=ASKED)
    assert [peer.next_submit().budget for _ in range(4)] == [BUDGET] * 4


def test_the_answer_tells_how_it_went(client, peer):
    outcome = wire.BudgetOutcome(
        met=False,
        ttft_ms=30.0,
        tpot_ms=None,
        e2e_ms=90.0,
        predicted=wire.BudgetPrediction(ttft_ms=12.0),
    )

    peer.script = lambda submit: judged(submit, outcome)
    expected = BudgetOutcome(
        met=False,
        ttft_ms=30.0,
        tpot_ms=None,
        e2e_ms=90.0,
        predicted_ttft_ms=12.0,
        predicted_tpot_ms=None,
        predicted_e2e_ms=None,
    )
    assert client.complete("the").latency_budget == expected
    assert client.chat(MESSAGES).latency_budget == expected


def test_a_stream_tells_it_at_its_end(frontend_url):
    with Client(frontend_url, api_key="right") as client:
        stream = client.stream_complete("the", max_tokens=3)
        for _ in stream:
            assert stream.latency_budget is None or stream.usage is not None
        assert stream.latency_budget.met
        assert stream.completion.latency_budget == stream.latency_budget


@pytest.mark.parametrize(
    ("code", "error_kind", "base"),
    [
        ("BudgetUnmet", BudgetUnmet, Overloaded),
        ("BudgetImpossible", BudgetImpossible, InvalidRequest),
        ("DeadlineMissed", DeadlineMissed, RequestTimeout),
    ],
)
def test_a_refusal_has_its_type_and_is_not_tried_again(client, peer, code, error_kind, base):
    peer.script = refuse(code)
    with pytest.raises(error_kind, match="it is so") as caught:
        client.complete("the")
    error = caught.value
    assert isinstance(error, base)
    assert error.retry_after_s == 0.25
    assert error.asked == ASKED
    assert error.predicted == {"ttft_ms": 812.5, "e2e_ms": 900}
    peer.next_submit()
    assert peer.submits.empty()


def test_a_tenant_over_its_share_is_tried_again(client, peer):
    scripts = [refuse("TenantQuotaExceeded"), echo]
    peer.script = lambda submit: scripts.pop(0)(submit)
    assert client.complete("the", max_tokens=1).text == "the"


def test_what_ends_a_stream_in_the_middle_keeps_its_facts(client, peer):
    peer.script = refuse("RequestFailed", num_tokens=1)
    with pytest.raises(StreamBroken) as caught:
        client.read_complete("the")
    assert (caught.value.code, caught.value.retry_after_s) == ("request_failed", 0.25)


def test_a_wrong_budget_is_refused_alike(client):
    for budget in ({"ttft_ms": -1.0}, {"priority": "urgent"}):
        with pytest.raises(InvalidRequest) as caught:
            client.complete("the", latency_budget=budget)
        assert caught.value.param == f"latency_budget.{next(iter(budget))}"
    for budget in ({"ttft": 1.0}, {"ttft_ms": "soon"}, 5):
        with pytest.raises(InvalidRequest):
            client.complete("the", latency_budget=budget)


def test_the_command_line_asks_for_it(frontend_url, peer):
    command = [sys.executable, "-m", "shardline_server", "complete", frontend_url, "the"]
    command += ["--api-key", "right", "--ttft-ms", "500", "--deadline-ms", "9000"]
    command += ["--priority", "batch", "--on-miss", "degrade"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    budget = peer.next_submit().budget
    assert budget == BUDGET
    peer.script = refuse("BudgetUnmet")
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "Error: it is so\n")


@pytest.mark.parametrize("given", ["nowhere", "to the client", "to the call"])
def test_a_timeout_is_a_deadline_over_grpc_if_somebody_has_asked_for_it(
    make_client, frontend_url, door, peer, given
):
    client = make_client(
        frontend_url, api_key="right", **({"timeout_s": 50} if given == "to the client" else {})
    )
    for ask in (client.complete, client.read_complete):
        ask("the fox", max_tokens=1, **({"timeout_s": 50} if given == "to the call" else {}))
        deadline_ms = peer.next_submit().budget.deadline_ms
        if door == "http" or given == "nowhere":
            assert deadline_ms is None
        else:
            assert 40_000 < deadline_ms < 60_000  # gRPC sends it in coarse units
