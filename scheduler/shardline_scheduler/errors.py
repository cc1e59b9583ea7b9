"""Why a request is not taken in.

SchedulerError
├── DuplicateRequest     the id belongs to a request that is still alive
├── QueueFull            too many requests wait already; come back later
└── RequestTooLong       it could never finish, not even alone
"""


class SchedulerError(Exception):
    """Base of everything that `Scheduler.add` raises on purpose; nothing was taken in."""


class DuplicateRequest(SchedulerError):
    """A live request has this id already."""

    def __init__(self, request_id: str) -> None:
        super().__init__(f"request id {request_id!r} is in use; ids must be unique while alive")
        self.request_id = request_id


class QueueFull(SchedulerError):
    """The waiting queue is at its limit."""

    def __init__(self, num_waiting: int, max_num_waiting: int) -> None:
        super().__init__(
            f"{num_waiting} requests are waiting and the limit is {max_num_waiting}; retry later"
        )
        self.num_waiting = num_waiting
        self.max_num_waiting = max_num_waiting


class RequestTooLong(SchedulerError):
    """Prompt and output together exceed `max_num_tokens`: the context window or all KV memory."""

    def __init__(self, num_prompt_tokens: int, max_tokens: int, max_num_tokens: int) -> None:
        super().__init__(
            f"{num_prompt_tokens} prompt tokens and max_tokens {max_tokens} make "
            f"{num_prompt_tokens + max_tokens} tokens, and at most {max_num_tokens} fit; "
            "shorten the prompt or lower max_tokens"
        )
        self.num_prompt_tokens = num_prompt_tokens
        self.max_tokens = max_tokens
        self.max_num_tokens = max_num_tokens
