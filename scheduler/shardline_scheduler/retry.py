"""When to come back: the earliest time that a forecast is sure of, found by trying."""

from bisect import bisect_left
from collections.abc import Callable
from functools import cache
from math import ceil, log

# What a retry waits at least, where something is short only for a moment.
LEAST_WAIT_S = 0.05
# Each wait that is tried is longer than the one before it by this factor.
_GROWTH = 1.2


class Retries:
    """Remembers what it found: those who are refused together are short of the same, and the answer
    to one is nearly always that to the next.
    """

    def __init__(self) -> None:
        self._last_found = 0.0

    def earliest(
        self, now: float, last_end: float, passes: Callable[[float], bool]
    ) -> float | None:
        """The first time at which `passes` holds, of those that follow `now` by longer and longer
        waits; None if there is none up to `last_end`, when all that is promised is over.

        Whoever leaves makes room: as soon as `passes` holds it goes on holding.

        With an exact model, whoever comes at that time is admitted if nobody else has come, with
        one exception: while a request without limits is alive, refusals may be repeated, whatever
        was short. Such a one may starve and be promised something by then (patience.py), and may
        need more time than is kept for such here.
        """
        longest_s = max(LEAST_WAIT_S, last_end - now)
        num_waits = 1 + _index_of(longest_s)

        def time_of(index: int) -> float:
            return now + min(longest_s, LEAST_WAIT_S * _GROWTH**index)

        likely = min(_index_of(self._last_found - now), num_waits - 1)
        index = _first(lambda i: passes(time_of(i)), num_waits, likely)
        self._last_found = time_of(min(index, num_waits - 1))
        return self._last_found if index < num_waits else None


def _index_of(wait_s: float) -> int:
    """The first wait that is no shorter."""
    return max(0, ceil(log(max(LEAST_WAIT_S, wait_s) / LEAST_WAIT_S, _GROWTH) - 1e-9))


def _first(passes: Callable[[int], bool], num: int, likely: int) -> int:
    """The first index at which it passes; `num` if there is none. Looks around `likely` first."""
    passes, step = cache(passes), 1
    low, high = likely, likely + 1
    while low >= 0 and passes(low):
        low, high, step = low - step, low, 2 * step
    while high < num and not passes(high):
        low, high, step = high, high + step, 2 * step
    return bisect_left(range(num), True, max(0, low + 1), min(high, num), key=passes)
