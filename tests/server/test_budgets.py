"""Latency budgets through both doors: as they are asked for, and by whom."""

import json

import grpc
import httpx
import pytest
from tests.server.budget_requests import ASKED, BUDGET, error_of, post, rpc_request, ways
from tests.server.running import running_frontend

from shardline_scheduler.budget import LatencyBudget, OnMiss, Priority
from shardline_server.budgets import BudgetClass, BudgetClasses, BudgetPolicy
from shardline_server.door_config import DoorConfig
from shardline_server.protos.shardline.v1.generation_pb2_grpc import GenerationStub

HEADERS = {
    "X-Latency-Budget-Ttft-Ms": "500",
    "X-Latency-Budget-Tpot-Ms": "40.5",
    "x-latency-budget-deadline-ms": "9e3",
    "X-Latency-Budget-Priority": "batch",
    "X-Latency-Budget-On-Miss": "reject",
}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_body_and_headers_ask_for_the_same(http, peer, path):
    assert post(http, path, latency_budget=ASKED).status_code == 200
    assert post(http, path, headers=HEADERS).status_code == 200
    half = {name: ASKED[name] for name in ("ttft_ms", "priority")}
    assert post(http, path, headers=HEADERS, latency_budget=half).status_code == 200
    assert [peer.next_submit().budget for _ in range(3)] == [BUDGET] * 3


def test_grpc_asks_for_the_same(stub, peer):
    for call in ways(stub):
        call(rpc_request(budget=ASKED))
        assert peer.next_submit().budget == BUDGET


def test_nothing_asked_for_is_nothing_wanted(http, stub, peer):
    post(http)
    stub.Generate(rpc_request())
    assert [peer.next_submit().budget for _ in range(2)] == [LatencyBudget()] * 2


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ({"ttft_ms": 0.0}, "latency_budget.ttft_ms"),
        ({"tpot_ms": -1.0}, "latency_budget.tpot_ms"),
        ({"deadline_ms": float("inf")}, "latency_budget.deadline_ms"),
        ({"deadline_ms": 1e9}, "latency_budget.deadline_ms"),
        ({"priority": "urgent"}, "latency_budget.priority"),
        ({"on_miss": "shrug"}, "latency_budget.on_miss"),
    ],
)
def test_a_wrong_budget_is_refused_alike(http, stub, peer, value, param):
    content = json.dumps({"prompt": "x", "latency_budget": value})
    response = http.post("/v1/completions", content=content)
    over_http = response.json()["error"]
    error = error_of(lambda: stub.Generate(rpc_request(budget=value)))
    assert (response.status_code, over_http["param"]) == (400, param)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert dict(error.trailing_metadata())["shardline-error-param"] == param
    assert error.details() == over_http["message"]
    assert peer.submits.empty()


@pytest.mark.parametrize("value", [{"ttft": 1}, {"ttft_ms": "500"}, {"ttft_ms": True}, 5, []])
def test_a_malformed_budget_is_refused(http, value):
    response = post(http, latency_budget=value)
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("latency_budget")


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({"X-Latency-Budget-Ttft-Ms": "soon"}, "x-latency-budget-ttft-ms"),
        ({"X-Latency-Budget-Tpot-Ms": "nan"}, "x-latency-budget-tpot-ms"),
        ({"X-Latency-Budget-Deadline-Ms": "-1"}, "x-latency-budget-deadline-ms"),
        ({"X-Latency-Budget-Priority": "urgent"}, "x-latency-budget-priority"),
        ({"X-Latency-Budget-On-Miss": ""}, "x-latency-budget-on-miss"),
        ({"X-Latency-Budget-Ttft": "5"}, "unknown header x-latency-budget-ttft;"),
    ],
)
def test_a_wrong_header_is_refused_by_name(http, peer, headers, words):
    response = post(http, headers=headers)
    assert response.status_code == 400
    assert words in response.json()["error"]["message"].lower()
    assert peer.submits.empty()


def test_a_header_that_contradicts_the_body_is_refused_with_both_named(http, peer):
    response = post(http, latency_budget={"ttft_ms": 100}, headers=HEADERS)
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert "latency_budget.ttft_ms is 100.0" in message
    assert "X-Latency-Budget-Ttft-Ms says 500.0" in message
    assert peer.submits.empty()


def test_the_deadline_of_a_call_is_a_deadline_and_the_tighter_holds(stub, peer):
    """On the wire grpc rounds a timeout up by a percent or two."""
    for call in ways(stub):
        call(rpc_request(), timeout=60)
        assert 50_000 < peer.next_submit().budget.deadline_ms < 65_000
        call(rpc_request(budget={"deadline_ms": 7000}), timeout=60)
        assert peer.next_submit().budget.deadline_ms == 7000
        call(rpc_request(budget={"deadline_ms": 70_000}), timeout=60)
        assert 50_000 < peer.next_submit().budget.deadline_ms < 65_000


def test_classes_fill_in_what_is_not_said(tokenizer_folder, peer):
    classes = BudgetClasses(
        interactive=BudgetClass(ttft_ms=300, tpot_ms=30),
        batch=BudgetClass(deadline_ms=60_000, on_miss=OnMiss.DEGRADE),
    )
    policy = BudgetPolicy(classes=classes, default=Priority.BATCH)
    with (
        running_frontend(peer.endpoint, tokenizer_folder, budgets=policy) as running,
        httpx.Client(base_url=running.addresses.http_url) as http,
        grpc.insecure_channel(running.addresses.grpc_target) as channel,
    ):
        stub = GenerationStub(channel)
        for said, expected in (
            (
                {"priority": "interactive", "ttft_ms": 100},
                LatencyBudget(ttft_ms=100, tpot_ms=30, priority=Priority.INTERACTIVE),
            ),
            (
                {},
                LatencyBudget(deadline_ms=60_000, priority=Priority.BATCH, on_miss=OnMiss.DEGRADE),
            ),
        ):
            post(http, latency_budget=said)
            stub.Generate(rpc_request(budget=said))
            assert [peer.next_submit().budget for _ in range(2)] == [expected] * 2


def test_a_tenant_is_named_by_its_key(tokenizer_folder, peer):
    keys = ("alice=first", "second", "abc==")
    with (
        running_frontend(
            peer.endpoint, tokenizer_folder, door=DoorConfig(api_keys=keys)
        ) as running,
        httpx.Client(base_url=running.addresses.http_url) as http,
        grpc.insecure_channel(running.addresses.grpc_target) as channel,
    ):
        stub = GenerationStub(channel)
        for key, tenant in (("first", "alice"), ("second", "key2"), ("abc==", "key3")):
            bearer = f"Bearer {key}"
            post(http, headers={"Authorization": bearer, "X-Tenant": "mallory"})
            stub.Generate(rpc_request(), metadata=[("authorization", bearer)])
            assert [peer.next_submit().tenant for _ in range(2)] == [tenant] * 2
        assert post(http, headers={"Authorization": "Bearer alice=first"}).status_code == 401


def test_without_keys_a_tenant_names_itself(http, stub, peer):
    post(http, headers={"X-Tenant": "team-a"})
    stub.Generate(rpc_request(), metadata=[("x-tenant", "team-a")])
    post(http)
    assert [peer.next_submit().tenant for _ in range(3)] == ["team-a", "team-a", ""]
    response = post(http, headers={"X-Tenant": "a b" * 40})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "X-Tenant")
    error = error_of(lambda: stub.Generate(rpc_request(), metadata=[("x-tenant", "a b")]))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
