"""Requests with latency budgets over both doors, and the budget that they ask for."""

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from shardline_scheduler.budget import LatencyBudget, Priority
from shardline_server.protos.shardline.v1 import generation_pb2 as pb

ASKED = {
    "ttft_ms": 500,
    "tpot_ms": 40.5,
    "deadline_ms": 9000,
    "priority": "batch",
    "on_miss": "reject",
}

BUDGET = LatencyBudget(ttft_ms=500, tpot_ms=40.5, deadline_ms=9000, priority=Priority.BATCH)


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
