"""Who steps back when a running request needs a block and none is left."""

from collections.abc import Iterable

from .policy import Key, Policy
from .request import Request, RequestState


class Victims:
    """The running requests that a step may preempt, last in the policy's order first.

    Nobody is preempted who is in the step already, and nobody by a request that comes later in the
    order. So the first in order always gets on and is never thrown back; when it has finished, the
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

    def next_behind(self, request: Request) -> Request | None:
        """The next to step back for `request`, if there is one."""
        if self._sorted is None:  # Once a step, and only where memory is short.
            self._sorted = sorted(self._running, key=self._order)
        while self._sorted:
            victim = self._sorted[-1]
            if victim.state is RequestState.RUNNING and victim.last_step_id != self._step_id:
                return victim if self._order(victim) > self._order(request) else None
            self._sorted.pop()
        return None

    def _order(self, request: Request) -> tuple[Key, int]:
        return self._policy.preemption_key(request, self._now), request.sequence
