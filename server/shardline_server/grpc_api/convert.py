"""Between protobuf messages and what the service speaks. Validation is HTTP's."""

from typing import Any, TypeVar

from google.protobuf import json_format
from google.protobuf.message import Message
from pydantic import BaseModel, ValidationError

from shardline_scheduler.budget import BudgetOutcome
from shardline_server.budgets import outcome_fields
from shardline_server.choice import Piece, TextLogprob
from shardline_server.generation import Usage
from shardline_server.messages import FinishReason
from shardline_server.prompts import ChatPrompt
from shardline_server.protos.shardline.v1 import generation_pb2 as pb
from shardline_server.request_fields import CompletionFields, invalid_request
from shardline_server.tokenizer import Tokenizer

ModelT = TypeVar("ModelT", bound=BaseModel)

FINISH_REASONS = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
    FinishReason.DEADLINE: pb.FINISH_REASON_DEADLINE,
}


def request_fields(request: pb.GenerateRequest) -> CompletionFields:
    """Validated as over HTTP; raises InvalidRequest."""
    message = request.sampling
    values = _present(message)
    for name in values.keys() & {"stop", "stop_token_ids"}:
        values[name] = list(values[name])
    if "logit_bias" in values:
        values["logit_bias"] = dict(message.logit_bias)
    if request.HasField("latency_budget"):
        values["latency_budget"] = _present(request.latency_budget)
    return _validated(CompletionFields, values)


def chat_prompt(message: pb.Chat, add_special_tokens: bool | None) -> ChatPrompt:
    """Validated as over HTTP; raises InvalidRequest."""
    values: dict[str, Any] = {
        field.name: value
        for field, value in message.ListFields()
        if field.name in {"add_generation_prompt", "continue_final_message"}
    }
    values["messages"] = [_present(one) for one in message.messages]
    values["chat_template_kwargs"] = json_format.MessageToDict(message.chat_template_kwargs)
    values["add_special_tokens"] = add_special_tokens
    return _validated(ChatPrompt, values)


def delta(request_id: str, piece: Piece, tokenizer: Tokenizer) -> pb.GenerateDelta:
    """One piece of one choice."""
    message = pb.GenerateDelta(
        request_id=request_id,
        choice=piece.choice,
        index=piece.index,
        token_ids=piece.token_ids,
        text=piece.text,
        logprobs=[_logprob(one, tokenizer) for one in piece.logprobs],
        finish_reason=FINISH_REASONS[piece.finish_reason],
    )
    if isinstance(piece.stop_reason, str):
        message.stop_string = piece.stop_reason
    elif piece.stop_reason is not None:
        message.stop_token_id = piece.stop_reason
    return message


def usage(usage: Usage) -> pb.Usage:
    """What a request took."""
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
    )


def outcome(outcome: BudgetOutcome) -> pb.BudgetOutcome:
    """How a latency budget was kept."""
    return pb.BudgetOutcome(**outcome_fields(outcome))  # type: ignore[arg-type]


def _validated(model: type[ModelT], values: dict[str, Any]) -> ModelT:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise invalid_request(error.errors()) from error


def _present(message: Message) -> dict[str, Any]:
    return {field.name: value for field, value in message.ListFields()}


def _logprob(one: TextLogprob, tokenizer: Tokenizer) -> pb.TokenLogprob:
    return pb.TokenLogprob(
        token_id=one.token_id,
        text=tokenizer.token_text(one.token_id),
        logprob=one.logprob,
        top=[
            pb.Alternative(token_id=token_id, text=tokenizer.token_text(token_id), logprob=logprob)
            for token_id, logprob in one.top
        ],
        text_offset=one.offset,
    )
