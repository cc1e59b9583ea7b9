"""Who comes first, and who has to step back when memory runs out."""

from typing import Protocol

from .request import Request

Key = tuple[float, ...]


class Policy(Protocol):
    """An order over requests. Ties go to the request that was added first.

    Progress depends on `preemption_key`: the request with the smallest key is never preempted, so
    a policy whose keys move must let some request stay smallest until it finishes.
    """

    def waiting_key(self, request: Request) -> Key:
        """Smallest is admitted first; must not change while the request waits."""
        ...

    def preemption_key(self, request: Request, now: float) -> Key:
        """Largest is preempted first, and only by a request with a smaller one."""
        ...


class Fcfs:
    """First come, first served; the last to come steps back."""

    def waiting_key(self, request: Request) -> Key:
        """By arrival, so a preempted request comes back before everybody who came after it."""
        return (request.arrival_time,)

    def preemption_key(self, request: Request, now: float) -> Key:
        """By arrival, whatever the time."""
        return (request.arrival_time,)


POLICIES: dict[str, type[Policy]] = {"fcfs": Fcfs}
