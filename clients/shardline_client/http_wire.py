"""Between our words and OpenAI's JSON; no I/O."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields as fields_of
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from shardline_client.errors import (
    KINDS_BY_CODE,
    AuthenticationFailed,
    ClientError,
    ErrorFacts,
    InvalidRequest,
    NotFound,
    Overloaded,
    RequestTimeout,
    ServerError,
)
from shardline_client.requests import Generate, Tokenize
from shardline_client.results import BudgetOutcome, Model, Piece, TokenLogprob, Tokens, Usage
from shardline_client.transport import Generated

JsonObject = Mapping[str, Any]

_ERRORS: dict[int, type[ClientError]] = {
    401: AuthenticationFailed,
    403: AuthenticationFailed,
    404: NotFound,
    408: RequestTimeout,
    429: Overloaded,
    503: Overloaded,
    504: RequestTimeout,
}


def path(request: Generate) -> str:
    """The endpoint for a request."""
    return "/v1/completions" if request.messages is None else "/v1/chat/completions"


def body(request: Generate, *, openai_only: bool) -> dict[str, Any]:
    """The JSON of a streamed request. `openai_only` adds no field that the caller did not ask for
    and that OpenAI does not have.
    """
    fields: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    fields |= {**request.sampling, **request.template}
    if request.model is not None:
        fields["model"] = request.model
    if request.add_special_tokens is not None:
        fields["add_special_tokens"] = request.add_special_tokens
    if request.latency_budget is not None:
        fields["latency_budget"] = request.latency_budget
    if not openai_only:
        fields["return_token_ids"] = True
    if request.messages is None:
        return fields | {"prompt": request.prompt}
    if "logprobs" in fields:
        fields |= {"logprobs": True, "top_logprobs": fields["logprobs"]}
    return fields | {"messages": request.messages}


def tokenize_body(request: Tokenize) -> dict[str, Any]:
    """The JSON for /tokenize."""
    fields: dict[str, Any] = {} if request.model is None else {"model": request.model}
    if request.messages is not None:
        return fields | {"messages": request.messages}
    return fields | {"prompt": request.text}


def models(answer: JsonObject) -> tuple[Model, ...]:
    """Of /v1/models."""
    return tuple(
        Model(
            name=card["id"],
            owned_by=card.get("owned_by") or "",
            max_model_len=card.get("max_model_len"),
        )
        for card in answer["data"]
    )


def tokens(answer: JsonObject) -> Tokens:
    """Of /tokenize."""
    return Tokens(token_ids=tuple(answer["tokens"]), max_model_len=answer["max_model_len"])


class ChunkReader:
    """Turns the chunks of one stream into Pieces; it counts the tokens of each choice."""

    def __init__(self, request: Generate) -> None:
        self._num_tokens = [0] * request.num_choices
        self._num_top = request.sampling.get("logprobs") or 0

    def read(self, chunk: JsonObject) -> Iterator[Generated]:
        """What a chunk says. Raises ServerError for an error record."""
        if chunk.get("error") is not None:
            raise error_of(500, json.dumps(chunk), {})
        for choice in chunk.get("choices") or ():
            piece = self._piece(choice)
            if piece.text or piece.token_ids or piece.logprobs or piece.finish_reason:
                yield piece
        if (used := chunk.get("usage")) is not None:
            details = used.get("prompt_tokens_details") or {}
            yield Usage(
                prompt_tokens=used["prompt_tokens"],
                completion_tokens=used.get("completion_tokens") or 0,
                cached_tokens=details.get("cached_tokens") or 0,
            )
        if (outcome := chunk.get("latency_budget")) is not None:
            yield BudgetOutcome(**{one.name: outcome[one.name] for one in fields_of(BudgetOutcome)})

    def _piece(self, choice: JsonObject) -> Piece:
        number = choice.get("index") or 0
        token_ids = tuple(choice.get("token_ids") or ())
        index = self._num_tokens[number]
        self._num_tokens[number] += len(token_ids)
        text = choice["delta"].get("content") if "delta" in choice else choice.get("text")
        return Piece(
            choice=number,
            index=index,
            text=text or "",
            token_ids=token_ids,
            logprobs=tuple(_logprobs(choice.get("logprobs") or {}, self._num_top)),
            finish_reason=choice.get("finish_reason"),
            stop_reason=choice.get("stop_reason"),
        )


def _logprobs(logprobs: JsonObject, num_top: int) -> Iterator[TokenLogprob]:
    if "content" in logprobs:  # chat
        for one in logprobs["content"] or ():
            top = {other["token"]: other["logprob"] for other in one.get("top_logprobs") or ()}
            yield TokenLogprob(text=one["token"], logprob=one["logprob"], top=top)
        return
    tops = logprobs.get("top_logprobs") or []
    for i, text in enumerate(logprobs.get("tokens") or ()):
        # The chosen token is among them even where it is not one of the likeliest.
        best = sorted((tops[i] or {}).items(), key=lambda item: -item[1]) if tops else []
        logprob = logprobs["token_logprobs"][i]
        yield TokenLogprob(text=text, logprob=logprob, top=dict(best[:num_top]))


def error_of(status: int, text: str, headers: Mapping[str, str]) -> ClientError:
    """The exception for an answer that is not a success, whoever wrote it."""
    fields = _error_fields(text)
    code = _text_or_none(fields.get("code"))
    kind = _ERRORS.get(status, InvalidRequest if 400 <= status < 500 else ServerError)
    message = fields.get("message") or f"HTTP {status}: {' '.join(text.split())[:200] or 'no text'}"
    budget = fields.get("latency_budget") or {}
    facts = ErrorFacts(
        code=code,
        param=_text_or_none(fields.get("param")),
        # The header has whole seconds.
        retry_after_s=fields.get("retry_after_s") or retry_after_s(headers.get("retry-after", "")),
        asked=budget.get("asked"),
        predicted=budget.get("predicted"),
    )
    return KINDS_BY_CODE.get(code or "", kind)(str(message), facts=facts)


def retry_after_s(value: str) -> float | None:
    """Of a Retry-After header: seconds or a date (RFC 9110); None where it says nothing."""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())


def _error_fields(text: str) -> JsonObject:
    """OpenAI's error object, or the flat one that some servers send."""
    try:
        answer = json.loads(text)
    except ValueError:
        return {}
    if not isinstance(answer, dict):
        return {}
    inner = answer.get("error", answer)
    return inner if isinstance(inner, dict) else {"message": inner}


def _text_or_none(value: object) -> str | None:
    return None if value is None else str(value)
