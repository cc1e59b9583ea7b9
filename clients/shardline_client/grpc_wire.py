"""Between our words and protobuf's; no I/O."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any, cast

import grpc
from google.protobuf.message import DecodeError, Message

from shardline_client.errors import (
    KINDS_BY_CODE,
    AuthenticationFailed,
    ClientError,
    ConnectionFailed,
    ErrorFacts,
    InvalidRequest,
    NotFound,
    Overloaded,
    RequestTimeout,
    ServerError,
)
from shardline_client.protos.shardline.v1 import generation_pb2 as pb
from shardline_client.requests import Generate, Tokenize
from shardline_client.requests import Message as ChatMessage
from shardline_client.results import (
    BudgetOutcome,
    Model,
    Piece,
    StopReason,
    TokenLogprob,
    Tokens,
    Usage,
)
from shardline_client.transport import Generated

_FINISH_REASONS = {
    pb.FINISH_REASON_UNSPECIFIED: None,
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_ABORT: "abort",
    pb.FINISH_REASON_DEADLINE: "deadline",
}
_ERRORS: dict[grpc.StatusCode, type[ClientError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.UNAUTHENTICATED: AuthenticationFailed,
    grpc.StatusCode.PERMISSION_DENIED: AuthenticationFailed,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.UNIMPLEMENTED: NotFound,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.DEADLINE_EXCEEDED: RequestTimeout,
}


def generate_request(request: Generate) -> pb.GenerateRequest:
    """Raises InvalidRequest for what protobuf cannot hold."""
    try:
        message = pb.GenerateRequest(
            request_id=request.request_id,
            model=request.model or "",
            sampling=pb.SamplingParams(**request.sampling),
        )
        if request.latency_budget is not None:
            message.latency_budget.CopyFrom(pb.LatencyBudget(**request.latency_budget))
        if request.add_special_tokens is not None:
            message.add_special_tokens = request.add_special_tokens
        if request.messages is not None:
            message.chat.CopyFrom(_chat(request.messages, request.template))
        elif isinstance(request.prompt, str):
            message.text = request.prompt
        else:
            message.token_ids.CopyFrom(pb.TokenIds(ids=request.prompt))
        return message
    except (TypeError, ValueError, AttributeError) as error:
        raise InvalidRequest(f"The request cannot be sent: {error}") from error


def tokenize_request(request: Tokenize) -> pb.TokenizeRequest:
    """Raises InvalidRequest for what protobuf cannot hold."""
    try:
        if request.messages is not None:
            chat = _chat(request.messages, {})
            return pb.TokenizeRequest(model=request.model or "", chat=chat)
        return pb.TokenizeRequest(model=request.model or "", text=request.text or "")
    except (TypeError, ValueError, AttributeError) as error:
        raise InvalidRequest(f"The request cannot be sent: {error}") from error


def parts(delta: pb.GenerateDelta) -> Iterator[Generated]:
    """What a delta says."""
    yield Piece(
        choice=delta.choice,
        index=delta.index,
        text=delta.text,
        token_ids=tuple(delta.token_ids),
        logprobs=tuple(_logprob(one) for one in delta.logprobs),
        finish_reason=_FINISH_REASONS.get(delta.finish_reason, "unknown"),
        stop_reason=_stop_reason(delta),
    )
    if delta.HasField("usage"):
        yield Usage(
            prompt_tokens=delta.usage.prompt_tokens,
            completion_tokens=delta.usage.completion_tokens,
            cached_tokens=delta.usage.cached_tokens,
        )
    if delta.HasField("latency_budget"):
        yield _outcome(delta.latency_budget)


def models(answer: pb.ListModelsResponse) -> tuple[Model, ...]:
    """Of ListModels."""
    return tuple(
        Model(name=model.name, owned_by="shardline", max_model_len=model.max_model_len)
        for model in answer.models
    )


def tokens(answer: pb.TokenizeResponse) -> Tokens:
    """Of Tokenize."""
    return Tokens(token_ids=tuple(answer.token_ids), max_model_len=answer.max_model_len)


def error_of(error: grpc.aio.AioRpcError) -> ClientError:
    """The exception for a call that failed."""
    # Pairs, whatever the type stubs of grpc say.
    pairs = cast(Iterable[tuple[str, str | bytes]], error.trailing_metadata() or ())
    trailing = {key: value for key, value in pairs if isinstance(value, str)}
    code = trailing.get("shardline-error-code")
    retry, refusal = _details(error)
    facts = ErrorFacts(
        code=code,
        param=trailing.get("shardline-error-param"),
        retry_after_s=_retry_after_s(trailing) if retry is None else retry,
        asked=None if refusal is None else _present(refusal.asked),
        predicted=None if refusal is None else _present(refusal.predicted),
    )
    kind = KINDS_BY_CODE.get(code or "") or _kind(error.code(), is_from_server=code is not None)
    return kind(error.details() or error.code().name, facts=facts)


def _kind(code: grpc.StatusCode, *, is_from_server: bool) -> type[ClientError]:
    if code is grpc.StatusCode.UNAVAILABLE:  # grpc itself says so where there is no connection
        return Overloaded if is_from_server else ConnectionFailed
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and not is_from_server:
        return InvalidRequest  # grpc's own word for a message that is too long
    return _ERRORS.get(code, ServerError)


def _details(error: grpc.aio.AioRpcError) -> tuple[float | None, pb.BudgetRefusal | None]:
    """What google.rpc details say: seconds to wait, and the refused budget. Raises nothing."""
    from google.rpc.error_details_pb2 import RetryInfo  # only calls that fail need them
    from grpc_status import rpc_status

    try:
        status = rpc_status.from_call(cast(grpc.Call, error))  # reads it as one
    except (ValueError, DecodeError):  # of a server that is not ours
        return None, None
    retry, refusal = RetryInfo(), pb.BudgetRefusal()
    found: tuple[float | None, pb.BudgetRefusal | None] = None, None
    for detail in () if status is None else status.details:
        if detail.Unpack(retry):
            found = retry.retry_delay.ToTimedelta().total_seconds(), found[1]
        elif detail.Unpack(refusal):
            found = found[0], refusal
    return found


def _retry_after_s(trailing: Mapping[str, str]) -> float | None:
    """Of the trailing metadata `retry-delay`, in seconds, with or without the unit."""
    try:
        return max(0.0, float(trailing.get("retry-delay", "").removesuffix("s")))
    except ValueError:
        return None


def _chat(messages: tuple[ChatMessage, ...], template: Mapping[str, Any]) -> pb.Chat:
    fields = dict(template)
    variables = fields.pop("chat_template_kwargs", None)
    chat = pb.Chat(messages=[pb.ChatMessage(**message) for message in messages], **fields)
    if variables is not None:
        chat.chat_template_kwargs.update(variables)
    return chat


def _present(message: Message) -> dict[str, Any]:
    return {field.name: value for field, value in message.ListFields()}


def _outcome(message: pb.BudgetOutcome) -> BudgetOutcome:
    values: dict[str, Any] = dict.fromkeys(field.name for field in fields(BudgetOutcome))
    values |= _present(message) | {"met": message.met, "e2e_ms": message.e2e_ms}
    return BudgetOutcome(**values)


def _stop_reason(delta: pb.GenerateDelta) -> StopReason:
    match delta.WhichOneof("stop_reason"):
        case "stop_string":
            return delta.stop_string
        case "stop_token_id":
            return delta.stop_token_id
        case _:
            return None


def _logprob(one: pb.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(
        text=one.text,
        logprob=one.logprob if one.HasField("logprob") else None,
        top={other.text: other.logprob for other in one.top},
    )
