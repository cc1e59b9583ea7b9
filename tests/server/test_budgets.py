"""Latency budgets through both doors: as they are asked for, refused, missed and told about."""

import itertools
import json

import grpc
import httpx
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from tests.server.conftest import running_engine_process
from tests.server.peer import delta, echo
from tests.server.running import running_frontend

from shardline_scheduler.budget import (
    BudgetOutcome,
    BudgetPrediction,
    LatencyBudget,
    OnMiss,
    Priority,
)
from shardline_server.budgets import BudgetClass, BudgetClasses, BudgetPolicy
from shardline_server.door_config import DoorConfig
from shardline_server.messages import FinishReason, Refusal
from shardline_server.protos.shardline.v1 import generation_pb2 as pb
from shardline_server.protos.shardline.v1.generation_pb2_grpc import GenerationStub

ASKED = {
    "ttft_ms": 500,
    "tpot_ms": 40.5,
    "deadline_ms": 9000,
    "priority": "batch",
    "on_miss": "reject",
}
HEADERS = {
    "X-Latency-Budget-Ttft-Ms": "500",
    "X-Latency-Budget-Tpot-Ms": "40.5",
    "x-latency-budget-deadline-ms": "9e3",
    "X-Latency-Budget-Priority": "batch",
    "X-Latency-Budget-On-Miss": "reject",
}
BUDGET = LatencyBudget(ttft_ms=500, tpot_ms=40.5, deadline_ms=9000, priority=Priority.BATCH)
OUTCOMES = [
    BudgetOutcome(
        met=True,
        ttft_ms=10.0,
        tpot_ms=None,
        e2e_ms=90.0,
        predicted=BudgetPrediction(ttft_ms=12.0),
    ),
    BudgetOutcome(
        met=False,
        ttft_ms=30.0,
        tpot_ms=5.0,
        e2e_ms=50.0,
        predicted=BudgetPrediction(ttft_ms=11.0, tpot_ms=6.0, e2e_ms=70.0),
    ),
]
TOLD = {
    "met": False,
    "ttft_ms": 30.0,
    "tpot_ms": 5.0,
    "e2e_ms": 90.0,
    "predicted_ttft_ms": 12.0,
    "predicted_tpot_ms": 6.0,
    "predicted_e2e_ms": 70.0,
}


def post(http, path="/v1/completions", headers=None, **fields):
    prompt = {"messages": [{"role": "user", "content": "Hi"}]} if "chat" in path else {}
    body = (prompt or {"prompt": "the fox"}) | {"max_tokens": 2} | fields
    return http.post(path, json=body, headers=headers)


def rpc_request(text="the fox", budget=None, **sampling):
    params = pb.SamplingParams(**{"max_tokens": 2} | sampling)
    return pb.GenerateRequest(
        text=text, sampling=params, latency_budget=pb.LatencyBudget(**budget or {})
    )


def ways(stub):
    return stub.Generate, lambda request, **options: list(stub.GenerateStream(request, **options))


def error_of(call):
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


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


def details_of(error):
    status = rpc_status.from_call(error)
    assert isinstance(status, status_pb2.Status)
    details = {}
    for packed in status.details:
        name = packed.TypeName().rpartition(".")[2]
        known = {"RetryInfo": error_details_pb2.RetryInfo, "BudgetRefusal": pb.BudgetRefusal}
        details[name] = known[name]()
        assert packed.Unpack(details[name])
    return details


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


def missed(num_tokens):
    def script(submit):
        return [
            *(delta(submit.request_id, i, [300]) for i in range(num_tokens)),
            delta(
                submit.request_id,
                num_tokens,
                finish_reason=FinishReason.DEADLINE,
                budget=OUTCOMES[1],
            ),
        ]

    return script


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_before_the_first_token_is_an_error(http, stub, peer, stream):
    peer.script = missed(0)
    response = post(http, stream=stream, latency_budget=ASKED)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (504, "deadline_missed")
    assert error["latency_budget"]["asked"]["ttft_ms"] == 500
    assert error["latency_budget"]["predicted"]["e2e_ms"] == 70
    error = error_of(lambda: ways(stub)[stream](rpc_request(budget=ASKED)))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert details_of(error)["BudgetRefusal"].asked.tpot_ms == 40.5


def test_a_deadline_after_a_token_is_a_finish_reason(http, stub, peer):
    peer.script = missed(2)
    [choice] = post(http).json()["choices"]
    assert choice["finish_reason"] == "deadline"
    *_, last, done = records(post(http, stream=True))
    assert last["choices"][0]["finish_reason"] == "deadline" and done == "[DONE]"
    assert not last["latency_budget"]["met"]
    assert stub.Generate(rpc_request()).choices[0].finish_reason == pb.FINISH_REASON_DEADLINE
    *_, piece = stub.GenerateStream(rpc_request())
    assert piece.finish_reason == pb.FINISH_REASON_DEADLINE and piece.HasField("usage")


def records(response):
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def tell(submit):
    *rest, last = echo(submit)
    outcome = OUTCOMES[int(submit.request_id[-1])]
    return [
        *rest,
        delta(
            last.request_id,
            last.index,
            last.token_ids,
            finish_reason=FinishReason.LENGTH,
            budget=outcome,
        ),
    ]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_every_answer_says_how_its_worst_choice_went(http, stub, peer, path):
    peer.script = tell
    assert post(http, path, n=2).json()["latency_budget"] == TOLD
    *chunks, _ = records(post(http, path, n=2, stream=True))
    assert ["latency_budget" in chunk for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1]["latency_budget"] == TOLD
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, usage, _ = records(post(http, path, n=2, **options))
    assert usage["usage"] and usage["latency_budget"] == TOLD
    assert not any("latency_budget" in chunk for chunk in chunks)


def test_grpc_says_it_too(stub, peer):
    peer.script = tell
    expected = pb.BudgetOutcome(**TOLD)
    assert stub.Generate(rpc_request(n=2)).latency_budget == expected
    pieces = list(stub.GenerateStream(rpc_request(n=2)))
    assert [piece.HasField("latency_budget") for piece in pieces] == [False] * 3 + [True]
    assert pieces[-1].latency_budget == expected


def test_a_choice_that_the_front_end_ends_is_told_by_its_own_clock(http):
    fields = {"max_tokens": 20, "stop": " fox"}
    for limit, is_met in ((86_000_000, True), (1e-6, False)):
        outcome = post(http, **fields, latency_budget={"ttft_ms": limit}).json()["latency_budget"]
        assert outcome["met"] is is_met
        assert 0 < outcome["ttft_ms"] <= outcome["e2e_ms"]
        assert outcome["predicted_ttft_ms"] is None


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


@pytest.fixture
def measured(tiny_model, tmp_path):
    """The real engine, which has measured what its steps take before the first request."""
    with (
        running_engine_process(tiny_model, measure_seconds=1.0, cache=tmp_path) as engine,
        running_frontend(engine.read_endpoint(), tiny_model) as running,
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
