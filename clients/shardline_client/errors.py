"""The one exception tree; each door's failures are mapped to it once, so both raise the same.

ClientError
├── ConnectionFailed        no connection, or it was lost before the answer began
├── RequestTimeout          `timeout_s` went by, or the server's own deadline
├── StreamBroken            the answer had begun and cannot go on; what came before is good
└── RequestRefused          the server answered, and the answer is no
    ├── InvalidRequest      the request is wrong; `param` names the field
    ├── AuthenticationFailed
    ├── NotFound            unknown model or path
    ├── Overloaded          come back later, after `retry_after_s` if it says so
    └── ServerError         its own failure
"""


class ClientError(Exception):
    """Base of everything that this package raises on purpose.

    `code` and `param` are the server's words for programs, where it sent them; `retry_after_s` is
    how long it asked us to wait.
    """

    is_retryable = False

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s


class ConnectionFailed(ClientError):
    """There is no connection, or it was lost before the answer began."""

    is_retryable = True


class RequestTimeout(ClientError):
    """The whole answer was not there in time."""


class StreamBroken(ClientError):
    """The connection or the server failed in the middle of an answer; never retried."""


class RequestRefused(ClientError):
    """The server answered that it will not, or cannot."""


class InvalidRequest(RequestRefused):
    """The request is wrong as it is written; `param` names the field, where one can be named."""


class AuthenticationFailed(RequestRefused):
    """No API key, a wrong one, or one that may not do this."""


class NotFound(RequestRefused):
    """A model or a path that this server does not have."""


class Overloaded(RequestRefused):
    """The server is full, loading or leaving (HTTP 429 and 503); another time may do."""

    is_retryable = True


class ServerError(RequestRefused):
    """The server failed, or answered what nobody can read."""
