"""What requests without limits may count on while others are promised all there is.

Guests get what is left over, and under overload of promised requests that may be nothing for ever.
So a guest who has not got on for some seconds is promised something himself: a first token by a
time that spreads the work of all such guests over a tenth of the pipe. He is in the demand test of
whoever comes later, so that nobody is late for him; where there is no place for him yet, newcomers
leave one. His own budget still asks for nothing: he is never ended.
"""

from collections.abc import Iterable

from .config import SchedulerConfig
from .request import NEVER, Request
from .terms import Rank

_PATIENCE_S = 5.0
_LOOK_INTERVAL_S = 0.25
_SHARE = 0.1


class Patience:
    """Picks the guests whose turn it is. `starving` is who could not be given a place so far."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.starving: Request | None = None
        self._most = max(1, int(_SHARE * config.max_num_seqs))
        self._helped: set[Request] = set()
        self._next_look = NEVER
        self._last_due = NEVER

    def is_time(self, now: float) -> bool:
        """Whether it is worth looking again."""
        if now < self._next_look or len(self._helped) >= self._most:
            return False
        self._next_look = now + _LOOK_INTERVAL_S
        return True

    def find(self, requests: Iterable[Request], now: float) -> Request | None:
        """Of those that have not got on for too long, the first in order."""
        waiting = (
            request
            for request in requests
            if request.terms.rank is Rank.UNLIMITED and _impatient_at(request) <= now
        )
        return min(waiting, key=_order, default=None)

    def helped_by(self, time: float, guests: Iterable[Request]) -> list[Request]:
        """Those of these, of the first in order, who may be promised something then; who is now
        may be over.
        """
        return sorted((one for one in guests if _impatient_at(one) <= time), key=_order)[
            : self._most
        ]

    def due(self, prefill_s: float, now: float) -> float:
        """When the next one's work is done, if all such work gets its share of the time."""
        return max(now, self._last_due) + prefill_s / _SHARE

    def help(self, request: Request, due: float | None) -> None:
        """He is promised his tokens, the first by `due` if it is still to come."""
        self.starving = None
        self._helped.add(request)
        if due is not None:
            self._last_due = due

    def forget(self, request: Request) -> None:
        """He is over, or promised nothing any more."""
        self._helped.discard(request)
        if self.starving is request:
            self.starving = None

    @property
    def share(self) -> float:
        """The part of the time for prompts that is kept for who starves."""
        return _SHARE


def _impatient_at(request: Request) -> float:
    return max(request.arrival_time, request.last_token_time) + _PATIENCE_S


def _order(request: Request) -> tuple[float, int]:
    return request.terms.turn, request.sequence
