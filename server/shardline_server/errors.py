"""The one exception tree; each door maps it once (`http_status` here, the gRPC code beside it).

ShardlineError
├── InvalidRequest            400 INVALID_ARGUMENT     the request is wrong; `param` names the field
│   ├── PromptTooLong         400 INVALID_ARGUMENT
│   ├── RequestTooLarge       413 INVALID_ARGUMENT     gRPC says it itself, as RESOURCE_EXHAUSTED
│   ├── HeadersTooLarge       431 INVALID_ARGUMENT     likewise
│   └── SlowRequest           408 INVALID_ARGUMENT     it did not arrive whole in time
├── AuthenticationFailed      401 UNAUTHENTICATED
├── ModelNotFound             404 NOT_FOUND
├── QueueFull                 503 RESOURCE_EXHAUSTED   come back later
├── BudgetUnmet               503 RESOURCE_EXHAUSTED   its budget cannot be kept now
├── BudgetImpossible          422 INVALID_ARGUMENT     no server, however empty, could keep it
├── TenantQuotaExceeded       429 RESOURCE_EXHAUSTED   this tenant has its share already
├── DeadlineMissed            504 DEADLINE_EXCEEDED    accepted, and ended before its first token
├── EngineUnavailable         503 UNAVAILABLE          dead
│   └── NotServing            503 UNAVAILABLE          not ready yet, or leaving
├── RequestFailed             500 INTERNAL             accepted, then failed
├── ReaderTooSlow             408 ABORTED              what it made was not read
└── ConfigError               at start only            the operator can mend it; no traceback
"""

from shardline_server.messages import Refusal

_FULL_FOR_S = 1.0
_ABSENT_FOR_S = 5.0


class ShardlineError(Exception):
    """Base of everything we raise on purpose. The message says what the reader can do.

    `refusal` says when to come back, and which budget was asked for, where that is known.
    """

    http_status = 500
    grpc_code = "INTERNAL"
    type = "server_error"
    code: str | None = None
    retry_after_s: float | None = None

    def __init__(
        self, message: str, *, param: str | None = None, refusal: Refusal | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.refusal = refusal or Refusal()
        if self.refusal.retry_after_s is not None:
            self.retry_after_s = self.refusal.retry_after_s


class InvalidRequest(ShardlineError):
    """The request cannot be served as it is written."""

    http_status = 400
    grpc_code = "INVALID_ARGUMENT"
    type = "invalid_request_error"


class PromptTooLong(InvalidRequest):
    """Prompt and output do not fit the context window; the message says how long is allowed."""

    code = "context_length_exceeded"


class RequestTooLarge(InvalidRequest):
    """The body is longer than the operator allows."""

    http_status = 413
    code = "request_too_large"


class HeadersTooLarge(InvalidRequest):
    """The headers are longer than the operator allows."""

    http_status = 431
    code = "headers_too_large"


class SlowRequest(InvalidRequest):
    """The request did not arrive whole in the time that it has."""

    http_status = 408
    code = "slow_request"


class AuthenticationFailed(ShardlineError):
    """No API key, or a wrong one."""

    http_status = 401
    grpc_code = "UNAUTHENTICATED"
    type = "invalid_request_error"
    code = "invalid_api_key"


class ModelNotFound(ShardlineError):
    """A model name that this server does not serve."""

    http_status = 404
    grpc_code = "NOT_FOUND"
    type = "invalid_request_error"
    code = "model_not_found"


class QueueFull(ShardlineError):
    """The waiting queue is at its limit."""

    http_status = 503
    grpc_code = "RESOURCE_EXHAUSTED"
    type = "overloaded_error"
    code = "queue_full"
    retry_after_s = _FULL_FOR_S


class BudgetUnmet(ShardlineError):
    """What runs and waits already leaves no room to keep the latency budget."""

    http_status = 503
    grpc_code = "RESOURCE_EXHAUSTED"
    type = "overloaded_error"
    code = "budget_unmet"
    retry_after_s = _FULL_FOR_S


class BudgetImpossible(ShardlineError):
    """The latency budget is below what an empty server needs."""

    http_status = 422
    grpc_code = "INVALID_ARGUMENT"
    type = "invalid_request_error"
    code = "budget_impossible"


class TenantQuotaExceeded(ShardlineError):
    """The server is busy, and this tenant has its fair share of it."""

    http_status = 429
    grpc_code = "RESOURCE_EXHAUSTED"
    type = "rate_limit_error"
    code = "tenant_quota_exceeded"
    retry_after_s = _FULL_FOR_S


class DeadlineMissed(ShardlineError):
    """A hard budget became impossible to keep after the request was accepted."""

    http_status = 504
    grpc_code = "DEADLINE_EXCEEDED"
    type = "timeout_error"
    code = "deadline_missed"


class EngineUnavailable(ShardlineError):
    """The engine is not ready, is leaving, or has died."""

    http_status = 503
    grpc_code = "UNAVAILABLE"
    type = "server_error"
    code = "engine_unavailable"


class NotServing(EngineUnavailable):
    """The engine still loads, or leaves; here or elsewhere somebody will serve soon."""

    retry_after_s = _ABSENT_FOR_S


class RequestFailed(ShardlineError):
    """The request was accepted and could not be finished."""

    code = "request_failed"


class ReaderTooSlow(ShardlineError):
    """The client left too much unread; the request was ended for it, and for nobody else."""

    http_status = 408
    grpc_code = "ABORTED"
    type = "invalid_request_error"
    code = "reader_too_slow"


class ConfigError(ShardlineError):
    """Something the operator set cannot work; printed as one line, exit status 2."""
