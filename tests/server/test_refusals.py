"""What is said over both doors to a request that is not taken in."""

import itertools

import grpc
import httpx
import pytest
from grpc_status import rpc_status
from tests.server.budget_requests import (
    ASKED,
    BUDGET,
    details_of,
    error_of,
    post,
    rpc_request,
    ways,
)
from tests.server.conftest import running_engine_process
from tests.server.peer import delta
from tests.server.running import running_frontend

from shardline_scheduler.budget import BudgetPrediction
from shardline_server.messages import FinishReason, Refusal
from shardline_server.protos.shardline.v1 import generation_pb2 as pb
from shardline_server.protos.shardline.v1.generation_pb2_grpc import GenerationStub

REFUSAL = Refusal(
    retry_after_s=2.25, asked=BUDGET, predicted=BudgetPrediction(ttft_ms=812.5, tpot_ms=41.0)
)


def refuse(code, **values):
    def script(submit):
        return [
            delta(
                submit.request_id,
                finish_reason=FinishReason.ERROR,
                error_code=code,
                error_message="it is so",
                **values,
            )
        ]

    return script


REFUSALS = [
    ("BudgetUnmet", 503, "budget_unmet", grpc.StatusCode.RESOURCE_EXHAUSTED),
    ("BudgetImpossible", 422, "budget_impossible", grpc.StatusCode.INVALID_ARGUMENT),
    ("TenantQuotaExceeded", 429, "tenant_quota_exceeded", grpc.StatusCode.RESOURCE_EXHAUSTED),
    ("DeadlineMissed", 504, "deadline_missed", grpc.StatusCode.DEADLINE_EXCEEDED),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("name", "status", "code", "_"), REFUSALS)
def test_a_refusal_over_http_says_what_was_asked_and_predicted(
    http, peer, name, status, code, _, stream
):
    peer.script = refuse(name, refusal=REFUSAL)
    response = post(http, stream=stream)
    assert (response.status_code, response.headers["retry-after"]) == (status, "3")
    error = response.json()["error"]
    assert (error["code"], error["message"], error["retry_after_s"]) == (code, "it is so", 2.25)
    assert error["latency_budget"]["predicted"] == {"ttft_ms": 812.5, "tpot_ms": 41.0}
    assert error["latency_budget"]["asked"] == ASKED


@pytest.mark.parametrize(("name", "_", "code", "status"), REFUSALS)
def test_a_refusal_over_grpc_has_the_standard_details(stub, peer, name, _, code, status):
    peer.script = refuse(name, refusal=REFUSAL)
    for call in ways(stub):
        error = error_of(lambda call=call: call(rpc_request()))
        assert (error.code(), error.details()) == (status, "it is so")
        trailing = dict(error.trailing_metadata())
        assert (trailing["shardline-error-code"], trailing["retry-delay"]) == (code, "2.250s")
        details = details_of(error)
        assert details["RetryInfo"].retry_delay.ToTimedelta().total_seconds() == 2.25
        assert details["BudgetRefusal"].asked == pb.LatencyBudget(**ASKED)
        assert details["BudgetRefusal"].predicted == pb.BudgetPrediction(ttft_ms=812.5, tpot_ms=41)


@pytest.mark.parametrize("name", ["QueueFull", "BudgetUnmet", "TenantQuotaExceeded"])
def test_a_full_server_says_when_to_come_back_in_any_case(http, stub, peer, name):
    peer.script = refuse(name)
    response = post(http)
    assert response.headers["retry-after"] == "1"
    assert "latency_budget" not in response.json()["error"]
    error = error_of(lambda: stub.Generate(rpc_request()))
    assert details_of(error)["RetryInfo"].retry_delay.seconds == 1
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_request_that_is_wrong_has_no_hint_to_come_back(http, stub):
    assert "retry-after" not in post(http, temperature=9).headers
    error = error_of(lambda: stub.Generate(rpc_request(temperature=9)))
    assert rpc_status.from_call(error) is None
    assert "retry-delay" not in dict(error.trailing_metadata())


def test_a_server_that_loads_or_leaves_says_when_to_come_back(own_peer, tokenizer_folder):
    own_peer._is_ready = False
    with (
        running_frontend(own_peer.endpoint, tokenizer_folder, wait_ready=False) as running,
        httpx.Client(base_url=running.addresses.http_url) as http,
        grpc.insecure_channel(running.addresses.grpc_target) as channel,
    ):
        stub = GenerationStub(channel)
        for words in ("loading", "shutting down"):
            for response in (post(http), http.get("/ready")):
                assert (response.status_code, response.headers["retry-after"]) == (503, "5")
                assert words in response.json()["error"]["message"]
            error = error_of(lambda: stub.Generate(rpc_request()))
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert details_of(error)["RetryInfo"].retry_delay.seconds == 5
            own_peer.send(own_peer.ready)
            running.call(running.frontend.wait_ready())
            running.frontend.service.refuse("the server is shutting down")


@pytest.fixture
def measured(tiny_model, tmp_path):
    """The real engine, which has measured what its steps take before the first request."""
    with (
        running_engine_process(tiny_model, measure_seconds=1.0, cache=tmp_path) as engine,
        running_frontend(engine.wait_begun(), tiny_model) as running,
    ):
        yield running


def test_what_even_an_empty_server_cannot_keep_is_refused_as_impossible(measured):
    for limit, prompt in itertools.product(("ttft_ms", "deadline_ms"), ([5], [5] * 100)):
        budget = {limit: 0.001}
        answer = httpx.post(
            f"{measured.addresses.http_url}/v1/completions",
            json={"prompt": prompt, "max_tokens": 2, "latency_budget": budget},
        )
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "budget_impossible")
        with grpc.insecure_channel(measured.addresses.grpc_target) as channel:
            request = pb.GenerateRequest(token_ids={"ids": prompt}, latency_budget=budget)
            with pytest.raises(grpc.RpcError) as caught:
                GenerationStub(channel).Generate(request)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
