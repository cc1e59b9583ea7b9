"""What is promised: the requests, their tightest limits, their load at its peak."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import inf

from .demand import Demand, Place
from .request import NEVER, Request, RequestState

# How long steps stay small for the sake of first tokens, after the last one was asked for.
_GUARD_S = 60.0
# A limit on first tokens is cut into so many steps: what is in flight delays whoever comes next.
STEPS_PER_LIMIT = 4


@dataclass(slots=True)
class _Share:
    """What one request adds to the sums."""

    num_tokens: int
    num_blocks: int


@dataclass(slots=True)
class Ledger:
    """Sums over all promised requests; every change is O(log n).

    `feasible_step_s` is the step time that the demand was last found feasible with,
    `longest_prompt` the most tokens that one had to compute since nobody was promised anything.
    """

    block_size: int
    demand: Demand = field(default_factory=Demand)
    feasible_step_s: float = inf
    num_tokens: int = 0
    num_blocks: int = 0
    _shares: dict[Request, _Share] = field(default_factory=dict)
    _token_limits: Counter[float] = field(default_factory=Counter)
    longest_prompt: int = 0
    _tightest: float | None = None
    _guard_s: float = inf
    _guard_until: float = NEVER

    def __len__(self) -> int:
        return len(self._shares)

    def __contains__(self, request: Request) -> bool:
        return request in self._shares

    @property
    def requests(self) -> list[Request]:
        """All that are promised."""
        return list(self._shares)

    @property
    def seconds_per_token(self) -> float:
        """The tightest limit on the time per token; sought again when nobody has it any more."""
        if self._tightest is None:
            self._tightest = min(self._token_limits, default=inf)
        return self._tightest

    @property
    def step_s(self) -> float:
        """The step time that planning has to hold to, for the demand's sake."""
        return self.feasible_step_s if len(self.demand) else inf

    def guard_s(self, now: float, max_in_flight: int) -> float:
        """The longest that a step may take without promises to keep, lest the next request with a
        limit on its first token like the last one's comes too late whatever is done.
        """
        if now > self._guard_until:
            return inf
        return self._guard_s / (STEPS_PER_LIMIT * max_in_flight)

    def guard(self, now: float, first_token_s: float) -> None:
        """Somebody has asked for a first token within that time, and others may come."""
        self._guard_s, self._guard_until = first_token_s, now + _GUARD_S

    def final_tokens(self, request: Request) -> int:
        """Prompt and output, as planned."""
        return request.num_prompt_tokens + request.terms.num_planned_tokens

    def final_blocks(self, request: Request) -> int:
        """At its end, with the spare one that starting leaves for each running request."""
        return -(-self.final_tokens(request) // self.block_size) + 1

    def add(self, request: Request, place: Place, prefill_s: float) -> None:
        """A request is promised."""
        terms = request.terms
        self._add_share(request)
        self.longest_prompt = max(self.longest_prompt, len(request.token_ids))
        self._token_limits[terms.seconds_per_token] += 1
        if self._tightest is not None:
            self._tightest = min(self._tightest, terms.seconds_per_token)
        if terms.first_token_by < inf:
            self.demand.put(request, place, terms.first_token_by, prefill_s)
        if terms.first_token_by < inf and not request.budget.is_unlimited:
            self.guard(request.arrival_time, terms.first_token_by - request.arrival_time)

    def replan(self, request: Request) -> None:
        """Its planned length has changed."""
        self._remove_share(request)
        self._add_share(request)

    def remove(self, request: Request) -> None:
        """It is over, or not promised any more."""
        limit = request.terms.seconds_per_token
        self._remove_share(request)
        if not self._shares:
            self.longest_prompt = 0
        self.demand.remove(request)
        self._token_limits[limit] -= 1
        if not self._token_limits[limit]:
            del self._token_limits[limit]
            if limit == self._tightest:
                self._tightest = None

    def compute_again(
        self, request: Request, place: Place, prefill_of: Callable[[Request], float]
    ) -> None:
        """It has lost what was computed, and its next token is due when it was."""
        terms, due = request.terms, request.terms.first_token_by
        if request.first_token_time != NEVER:
            due = request.first_token_time + terms.seconds_per_token * request.num_output_tokens
        self.demand.remove(request)
        if due < inf:
            self.demand.put(request, place, due, prefill_of(request))

    def peak_blocks(self) -> int:
        """The most that they ever need together; O(n log n)."""
        shares = self._shares.items()
        return peak_blocks(((r, share.num_tokens) for r, share in shares), self.block_size)

    def check(self) -> None:
        """Assert that the sums are those of the requests."""
        shares = self._shares.values()
        assert self.num_tokens == sum(share.num_tokens for share in shares)
        assert self.num_blocks == sum(share.num_blocks for share in shares)
        assert self._token_limits.total() == len(shares)
        assert self.seconds_per_token == min(self._token_limits, default=inf)
        assert len(self.demand) <= len(shares)

    def _add_share(self, request: Request) -> None:
        share = _Share(self.final_tokens(request), self.final_blocks(request))
        self._shares[request] = share
        self.num_tokens += share.num_tokens
        self.num_blocks += share.num_blocks

    def _remove_share(self, request: Request) -> None:
        share = self._shares.pop(request)
        self.num_tokens -= share.num_tokens
        self.num_blocks -= share.num_blocks


def peak_blocks(requests: Iterable[tuple[Request, int]], block_size: int) -> int:
    """The most blocks that requests need together, each with the tokens that it has in the end, if
    those that run get a token each at a time.

    Of those, the longest lived at the end of each one (LightLLM's rule); the others are counted in
    full, since nobody knows when they begin.
    """
    waiting, ends = 0, []
    for request, num_tokens in requests:
        if request.state is RequestState.RUNNING:
            ends.append((num_tokens - len(request.token_ids), num_tokens))
        else:
            waiting += -(-num_tokens // block_size) + 1
    ends.sort(reverse=True)
    peak = held = 0
    for count, (num_left, num_tokens) in enumerate(ends, start=1):
        held += num_tokens - num_left
        peak = max(peak, held + count * num_left)
    # Each one's last block may hold a single token, and starting leaves each a spare one.
    return waiting + peak // block_size + 2 * len(ends)
