"""Latency budgets through both doors: missed, and told about."""

import json

import grpc
import pytest
from tests.server.budget_requests import ASKED, details_of, error_of, post, rpc_request, ways
from tests.server.peer import delta, judged

from shardline_scheduler.budget import BudgetOutcome, BudgetPrediction
from shardline_server.messages import FinishReason
from shardline_server.protos.shardline.v1 import generation_pb2 as pb

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
    return judged(submit, OUTCOMES[int(submit.request_id[-1])])


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
