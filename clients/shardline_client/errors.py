"""The one exception tree; each door's failures are mapped to it once, so both raise the same.

ClientError
├── ConnectionFailed        no connection, or it was lost before the answer began
├── RequestTimeout          `timeout_s` went by, or the server's own deadline
│   └── DeadlineMissed      the server ended it for its latency budget, before the first token
├── StreamBroken            the answer had begun and cannot go on; what came before is good
└── RequestRefused          the server answered, and the answer is no
    ├── InvalidRequest      the request is wrong; `param` names the field
    │   └── BudgetImpossible  no server, however empty, could keep its latency budget
    ├── AuthenticationFailed
    ├── NotFound            unknown model or path
    ├── Overloaded          come back later, after `retry_after_s` if it says so
    │   └── BudgetUnmet     its latency budget cannot be kept now; never tried again by itself
    └── ServerError         its own failure
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ErrorFacts:
    """What a server says of a failure beside its message, where it says it.

    `code` and `param` are its words for programs, `retry_after_s` is how long to wait, `asked` the
    latency budget that it held against what it `predicted`, in milliseconds by name.
    """

    code: str | None = None
    param: str | None = None
    retry_after_s: float | None = None
    asked: Mapping[str, float | str] | None = None
    predicted: Mapping[str, float] | None = None


class ClientError(Exception):
    """Base of everything that this package raises on purpose; `facts` are the server's."""

    is_retryable = False

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        facts: ErrorFacts | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.facts = facts or ErrorFacts(code=code, param=param)

    @property
    def code(self) -> str | None:
        """The server's word for what is wrong."""
        return self.facts.code

    @property
    def param(self) -> str | None:
        """The field that is wrong."""
        return self.facts.param

    @property
    def retry_after_s(self) -> float | None:
        """How long the server asked us to wait."""
        return self.facts.retry_after_s

    @property
    def asked(self) -> Mapping[str, float | str] | None:
        """The latency budget that could not be kept, after its class had filled it in."""
        return self.facts.asked

    @property
    def predicted(self) -> Mapping[str, float] | None:
        """What the server expected instead: `ttft_ms`, `tpot_ms`, `e2e_ms`."""
        return self.facts.predicted


class ConnectionFailed(ClientError):
    """There is no connection, or it was lost before the answer began."""

    is_retryable = True


class RequestTimeout(ClientError):
    """The whole answer was not there in time."""


class DeadlineMissed(RequestTimeout):
    """Accepted, and ended by the server before its first token, its latency budget being lost."""


class StreamBroken(ClientError):
    """The connection or the server failed in the middle of an answer; never retried."""


class RequestRefused(ClientError):
    """The server answered that it will not, or cannot."""


class InvalidRequest(RequestRefused):
    """The request is wrong as it is written; `param` names the field, where one can be named."""


class BudgetImpossible(InvalidRequest):
    """The latency budget is below what even an empty server needs, which `predicted` tells."""


class AuthenticationFailed(RequestRefused):
    """No API key, a wrong one, or one that may not do this."""


class NotFound(RequestRefused):
    """A model or a path that this server does not have."""


class Overloaded(RequestRefused):
    """The server is full, loading or leaving (HTTP 429 and 503); another time may do."""

    is_retryable = True


class BudgetUnmet(Overloaded):
    """The server is too full to keep the latency budget now.

    Not tried again by itself: what waiting does to the budget is the caller's to decide.
    """

    is_retryable = False


class ServerError(RequestRefused):
    """The server failed, or answered what nobody can read."""


# What the server's `code` says more exactly than its status.
KINDS_BY_CODE: dict[str, type[ClientError]] = {
    "budget_impossible": BudgetImpossible,
    "budget_unmet": BudgetUnmet,
    "deadline_missed": DeadlineMissed,
}
