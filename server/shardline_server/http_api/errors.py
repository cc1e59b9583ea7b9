"""Every failure as OpenAI's error object, whatever raised it."""

import logging
import math

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from shardline_server.budgets import said_fields
from shardline_server.errors import InvalidRequest, ShardlineError
from shardline_server.http_api.responses import ErrorBody, ErrorResponse, RefusedBudget
from shardline_server.request_fields import invalid_request

logger = logging.getLogger("shardline.frontend")

NOT_AN_OBJECT = (
    "The request body must be a JSON object, sent with the header Content-Type: application/json."
)


def error_body(error: Exception) -> bytes:
    """The JSON of an error. What we did not raise on purpose is told in general words only."""
    if not isinstance(error, ShardlineError):
        error = ShardlineError("An internal error occurred; the server's log says more.")
    body = ErrorBody(
        message=error.message,
        type=error.type,
        param=error.param,
        code=error.code,
        retry_after_s=error.retry_after_s,
        latency_budget=_refused_budget(error),
    )
    return ErrorResponse(error=body).model_dump_json().encode()


def _refused_budget(error: ShardlineError) -> RefusedBudget | None:
    asked, predicted = error.refusal.asked, error.refusal.predicted
    if asked is None and predicted is None:
        return None
    return RefusedBudget(
        asked=None if asked is None else said_fields(asked),
        predicted=None if predicted is None else said_fields(predicted),
    )


def error_response(error: Exception, headers: dict[str, str] | None = None) -> Response:
    """The whole answer for an error."""
    status, headers = 500, headers or {}
    if isinstance(error, ShardlineError):
        status = error.http_status
        if error.retry_after_s is not None:
            headers = headers | {"Retry-After": str(math.ceil(error.retry_after_s))}
    return Response(error_body(error), status, headers, media_type="application/json")


def install_error_handlers(app: FastAPI) -> None:
    """Map our exceptions, pydantic's, the router's and unexpected ones."""
    app.add_exception_handler(ShardlineError, _own)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(HTTPException, _router)
    app.add_exception_handler(Exception, _own)


async def _own(request: Request, error: Exception) -> Response:
    is_unauthenticated = isinstance(error, ShardlineError) and error.http_status == 401
    return error_response(error, {"WWW-Authenticate": "Bearer"} if is_unauthenticated else None)


async def _validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    errors = [{**one, "loc": one["loc"][1:]} for one in error.errors()]  # loc[0] is "body"
    if errors[0]["type"] == "json_invalid":
        reason = errors[0]["ctx"]["error"]
        return error_response(InvalidRequest(f"The request body is not valid JSON: {reason}."))
    if errors[0]["loc"] == () and not isinstance(error.body, dict):
        return error_response(InvalidRequest(NOT_AN_OBJECT))
    return error_response(invalid_request(errors))


async def _router(request: Request, error: Exception) -> Response:
    """Unknown paths, wrong methods, and bodies that cannot be parsed at all."""
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, ShardlineError):
        return error_response(error.__cause__)
    messages = {
        404: f"Unknown path {request.url.path}; /docs lists what there is.",
        405: f"{request.url.path} does not answer {request.method}.",
    }
    mapped = InvalidRequest(messages.get(error.status_code, str(error.detail)))
    mapped.http_status = error.status_code
    return error_response(mapped, dict(error.headers or {}))
