"""When to come back: the earliest time that a forecast is sure of, found by trying."""

from bisect import bisect_left
from collections.abc import Callable
from math import sqrt

from .forecast import Forecast

# What a retry waits at least, where something is short only for a moment.
LEAST_WAIT_S = 0.05
_NUM_PROBES = 6


def earliest(
    forecast: Forecast,
    not_before: float,
    has_room: Callable[[float], bool],
    passes: Callable[[float], bool],
) -> float | None:
    """A time from `not_before` on at which `passes` holds, found by halving the wait; None if there
    is none even when all that is promised is over.

    Whoever leaves makes room: as soon as `has_room` holds it goes on holding, and so does `passes`.

    With an exact model, whoever comes at that time is admitted if nobody else has come, with one
    exception: while a request without limits is alive, refusals may be repeated, whatever was
    short. Such a one may starve and be promised something by then (patience.py), which takes part
    of its tenant's share and may need more time than is kept for such here.
    """
    times = [not_before, *(end for end in forecast.ends if end > not_before)]
    index = bisect_left(range(len(times) - 1), True, key=lambda i: has_room(times[i]))
    early, late = times[index], max(forecast.last_end, times[index])
    if passes(early):
        return early
    if not passes(late):
        return None
    start = not_before - LEAST_WAIT_S
    for _ in range(_NUM_PROBES):
        middle = start + sqrt((early - start) * (late - start))
        if passes(middle):
            late = middle
        else:
            early = middle
    return late
