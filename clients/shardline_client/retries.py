"""When to try again, and after how long: tenacity with what the server asked for."""

from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_after_attempt,
    wait_random_exponential,
)

from shardline_client.errors import ClientError
from shardline_client.settings import Retry


def attempts(retry: Retry) -> AsyncRetrying:
    """Attempts for `async for`; the last error is raised as it is."""
    backoff = wait_random_exponential(multiplier=retry.base_s, max=retry.max_wait_s)

    def wait(state: RetryCallState) -> float:
        asked = _error(state).retry_after_s
        return backoff(state) if asked is None else asked

    def is_worth_it(error: BaseException) -> bool:
        return (
            isinstance(error, ClientError)
            and error.is_retryable
            and (error.retry_after_s or 0.0) <= retry.max_wait_s
        )

    return AsyncRetrying(
        stop=stop_after_attempt(retry.max_attempts),
        wait=wait,
        retry=retry_if_exception(is_worth_it),
        reraise=True,
    )


def _error(state: RetryCallState) -> ClientError:
    assert state.outcome is not None
    error = state.outcome.exception()
    assert isinstance(error, ClientError)
    return error
