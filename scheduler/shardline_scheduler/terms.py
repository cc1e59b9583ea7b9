"""What the scheduler aims at for one request: fixed when it is admitted, given up at most once."""

from dataclasses import dataclass
from enum import IntEnum
from math import inf


class Rank(IntEnum):
    """Whom the pipe belongs to. Who is not PROMISED is a guest: served by what those leave over.

    PROMISED was admitted with limits that the cost model says can be kept; UNLIMITED asked for
    none; DEGRADED asked for some that cannot be kept, and would rather be late than refused.
    """

    PROMISED = 0
    UNLIMITED = 1
    DEGRADED = 2


@dataclass(slots=True)
class Terms:
    """`first_token_by` is a time in seconds, `seconds_per_token` the mean for each later token.

    A limit on the whole request has been split into these two. `prefill_s` and
    `num_planned_tokens` are the work and the output length that were planned with, and
    `num_cached_tokens` are perhaps not to be computed. `turn` is the tenant's virtual token counter
    at arrival, which orders guests of one class.
    """

    rank: Rank = Rank.UNLIMITED
    first_token_by: float = inf
    seconds_per_token: float = inf
    prefill_s: float = 0.0
    num_planned_tokens: int = 0
    num_cached_tokens: int = 0
    turn: float = 0.0

    @property
    def is_promised(self) -> bool:
        """Whether its limits are to be kept."""
        return self.rank is Rank.PROMISED
