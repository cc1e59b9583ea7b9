"""Who comes first, and who has to step back when memory runs out."""

from math import inf
from typing import ClassVar, Protocol

from .budget import Priority
from .request import NEVER, Request

Key = tuple[float, ...]

_CLASS_ORDER = {name: float(order) for order, name in enumerate(Priority)}


class Policy(Protocol):
    """An order over requests. Ties go to the request that was added first.

    `keeps_budgets` is whether requests are admitted, planned and ended by their latency budgets.
    """

    keeps_budgets: ClassVar[bool]

    def key(self, request: Request) -> Key:
        """Smallest is served first, and never preempted by a larger one: so somebody always gets
        on. It must not change, but when a request gives up its budget, or is promised something
        after all; each of which happens once.
        """
        ...

    def victim_key(self, request: Request, now: float) -> Key:
        """Of all that a request comes before, the largest is preempted first."""
        ...


class Fcfs:
    """First come, first served, whatever the budgets; the last to come steps back."""

    keeps_budgets: ClassVar[bool] = False

    def key(self, request: Request) -> Key:
        """By arrival, so a preempted request comes back before everybody who came after it."""
        return (request.arrival_time,)

    def victim_key(self, request: Request, now: float) -> Key:
        """By arrival, whatever the time."""
        return (request.arrival_time,)


class EarliestDeadline:
    """By deadline of the first token, later the more work it takes; then classes and tenants.

    Adding the work (Niyama's hybrid of deadline and shortest-job order, with a weight of one) lets
    short prompts pass long ones that are due at the same time. Admission knows this order.
    """

    keeps_budgets: ClassVar[bool] = True

    def key(self, request: Request) -> Key:
        """Promised deadlines, then classes; a class by its tenants' virtual token counters."""
        terms = request.terms
        due = terms.first_token_by + terms.prefill_s
        group = float(terms.rank)
        return group, due, _CLASS_ORDER[request.budget.priority], terms.turn

    def victim_key(self, request: Request, now: float) -> Key:
        """By slack per block: what it can lose for what it gives back."""
        slack = _slack(request, now) / max(1, len(request.block_table))
        return float(request.terms.rank), slack, *self.key(request)


def _slack(request: Request, now: float) -> float:
    """Seconds until the request has to get on, its lost work included."""
    terms = request.terms
    if request.first_token_time == NEVER:
        return terms.first_token_by - now - terms.prefill_s
    if terms.seconds_per_token == inf:
        return inf
    due = request.first_token_time + terms.seconds_per_token * request.num_output_tokens
    return due - now - terms.prefill_s


POLICIES: dict[str, type[Policy]] = {"edf": EarliestDeadline, "fcfs": Fcfs}
