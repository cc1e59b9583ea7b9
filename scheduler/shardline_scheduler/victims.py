"""Who steps back when a running request needs a block and none is left."""

from collections.abc import Iterable

from .policy import Key, Policy
from .request import Request, RequestState


class Victims:
    """The running requests that a step may preempt, in the order in which the policy gives them.

    Nobody is preempted who is in the step already, and nobody by a request with a larger key. So
    the one with the smallest key always gets on and is never thrown back; when it has finished, the
    next one is first: requests cannot throw each other back for ever.
    """

    def __init__(
        self, running: Iterable[Request], policy: Policy, step_id: int, now: float
    ) -> None:
        self._running = running
        self._policy = policy
        self._step_id = step_id
        self._now = now
        self._sorted: list[Request] | None = None
        self._has_guests = True

    def next_behind(self, request: Request) -> Request | None:
        """The next to step back for `request`, if there is one."""
        if self._sorted is None:  # Once a step, and only where memory is short.
            self._sorted = sorted(self._running, key=self._victim_order)
        for victim in reversed(self._sorted):
            if self._can_step_back(victim) and self._order(victim) > self._order(request):
                return victim
        return None

    def next_guest(self) -> Request | None:
        """The next to step back for a request whose budget is promised to be kept."""
        if not self._has_guests:
            return None
        if self._sorted is None:
            self._sorted = sorted(self._running, key=self._victim_order)
        for victim in reversed(self._sorted):
            if self._can_step_back(victim) and not victim.terms.is_promised:
                return victim
        self._has_guests = False
        return None

    def _can_step_back(self, victim: Request) -> bool:
        return victim.state is RequestState.RUNNING and victim.last_step_id != self._step_id

    def _order(self, request: Request) -> tuple[Key, int]:
        return self._policy.key(request), request.sequence

    def _victim_order(self, request: Request) -> tuple[Key, int]:
        return self._policy.victim_key(request, self._now), request.sequence
