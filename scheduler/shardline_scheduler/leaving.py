"""Which requests will not be done by a given time; asked when the server leaves."""

from collections.abc import Iterable
from statistics import mean

from .request import NEVER, Request


def late_requests(requests: Iterable[Request], deadline: float, now: float) -> list[Request]:
    """Those that end after `deadline` if they say all they may, at the pace that they had so far.

    Who has no pace yet is taken to have everybody's mean; where nobody has one, nobody is late.
    """
    alive = list(requests)
    paces = {request: pace for request in alive if (pace := _seconds_per_token(request, now))}
    if not paces:
        return []
    usual = mean(paces.values())
    return [
        request
        for request in alive
        if now + _num_tokens_to_come(request) * paces.get(request, usual) > deadline
    ]


def _num_tokens_to_come(request: Request) -> int:
    return request.sampling.max_tokens - request.num_output_tokens


def _seconds_per_token(request: Request, now: float) -> float | None:
    """The mean from the first token until now, so that a pause counts."""
    if request.first_token_time == NEVER or request.num_output_tokens < 2:
        return None
    return (now - request.first_token_time) / (request.num_output_tokens - 1)
