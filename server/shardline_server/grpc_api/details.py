"""What a failed call says beside code and message: trailing metadata and google.rpc details."""

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message

from shardline_server.budgets import said_fields
from shardline_server.errors import ShardlineError
from shardline_server.messages import Refusal
from shardline_server.protos.shardline.v1 import generation_pb2 as pb

Trailing = tuple[tuple[str, str | bytes], ...]


def trailing_metadata(error: ShardlineError) -> Trailing:
    """Everything, as pairs; binary details only where there are any."""
    plain = {
        "shardline-error-code": error.code,
        "shardline-error-param": error.param,
        "retry-delay": None if error.retry_after_s is None else f"{error.retry_after_s:.3f}s",
    }
    pairs = tuple((key, value) for key, value in plain.items() if value is not None)
    return pairs + _status_details(error)


def _status_details(error: ShardlineError) -> Trailing:
    from google.rpc import error_details_pb2, status_pb2  # only calls that fail need them
    from grpc_status import rpc_status

    details: list[Message] = []
    if error.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(round(error.retry_after_s * 1e9))
        details.append(retry)
    if error.refusal.asked is not None or error.refusal.predicted is not None:
        details.append(_budget_refusal(error.refusal))
    if not details:
        return ()
    code, _ = grpc.StatusCode[error.grpc_code].value
    status = status_pb2.Status(code=code, message=error.message)
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return tuple(rpc_status.to_status(status).trailing_metadata)


def _budget_refusal(refusal: Refusal) -> pb.BudgetRefusal:
    message = pb.BudgetRefusal()
    if refusal.asked is not None:
        message.asked.CopyFrom(pb.LatencyBudget(**said_fields(refusal.asked)))
    if refusal.predicted is not None:
        message.predicted.CopyFrom(pb.BudgetPrediction(**said_fields(refusal.predicted)))
    return message
