"""Between our words and protobuf's; no I/O."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import grpc

from shardline_client.errors import (
    AuthenticationFailed,
    ClientError,
    ConnectionFailed,
    InvalidRequest,
    NotFound,
    Overloaded,
    RequestTimeout,
    ServerError,
)
from shardline_client.protos.shardline.v1 import generation_pb2 as pb
from shardline_client.requests import Generate, Message, Tokenize
from shardline_client.results import Model, Piece, StopReason, TokenLogprob, Tokens, Usage
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
    trailing = {key: str(value) for key, value in pairs}
    code = trailing.get("shardline-error-code")
    return _kind(error.code(), is_from_server=code is not None)(
        error.details() or error.code().name,
        code=code,
        param=trailing.get("shardline-error-param"),
        retry_after_s=_retry_after_s(trailing),
    )


def _kind(code: grpc.StatusCode, *, is_from_server: bool) -> type[ClientError]:
    if code is grpc.StatusCode.UNAVAILABLE:  # grpc itself says so where there is no connection
        return Overloaded if is_from_server else ConnectionFailed
    return _ERRORS.get(code, ServerError)


def _retry_after_s(trailing: Mapping[str, str]) -> float | None:
    """Of the trailing metadata `retry-delay`, in seconds, with or without the unit."""
    try:
        return max(0.0, float(trailing.get("retry-delay", "").removesuffix("s")))
    except ValueError:
        return None


def _chat(messages: tuple[Message, ...], template: Mapping[str, Any]) -> pb.Chat:
    fields = dict(template)
    variables = fields.pop("chat_template_kwargs", None)
    chat = pb.Chat(messages=[pb.ChatMessage(**message) for message in messages], **fields)
    if variables is not None:
        chat.chat_template_kwargs.update(variables)
    return chat


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
