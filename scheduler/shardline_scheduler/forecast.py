"""What will still be promised at a later time, at most, if nobody else comes until then.

Prompts get on at least at the pace that admission has counted on, in their order, and a decode gets
a token at least once while every step in flight comes back. Where a machine does what the model
says, nobody is later than told here: so whoever fits beside an Outlook fits beside what is there.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from math import inf

from .capacity import Pricing
from .cost import StepLoad
from .demand import Demand, Pace
from .ledger import Ledger, peak_blocks
from .request import NEVER, Request
from .target import DECODES_STRETCH
from .verdict import Ahead


@dataclass(frozen=True, slots=True)
class Outlook:
    """What is promised at some time, at most; judged as a Ledger is."""

    ledger: Ledger
    requests: list[Request]
    num_tokens: int
    num_blocks: int
    seconds_per_token: float
    demand: Demand

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def step_s(self) -> float:
        """As now, while there is demand."""
        return self.ledger.step_s if len(self.demand) else inf

    @property
    def longest_prompt(self) -> int:
        """As now; forgotten when nobody is promised anything."""
        return self.ledger.longest_prompt if self.requests else 0

    def final_tokens(self, request: Request) -> int:
        """Prompt and output, as planned."""
        return self.ledger.final_tokens(request)

    def final_blocks(self, request: Request) -> int:
        """At its end."""
        return self.ledger.final_blocks(request)

    def peak_blocks(self) -> int:
        """Of those that wait now, some run by then: a spare block each."""
        ledger = self.ledger
        shares = [(request, ledger.final_tokens(request)) for request in self.requests]
        return peak_blocks(shares, ledger.block_size) + len(shares)


@dataclass(slots=True)
class Guests:
    """Those who are promised nothing: how many, with how many tokens in the end, how many are still
    to come of all and of one, and their prompts, were all of them to be computed again.
    """

    num_requests: int = 0
    num_tokens: int = 0
    num_output_tokens: int = 0
    most_output_tokens: int = 0
    most_tokens: int = 0
    prompts: StepLoad = field(default_factory=StepLoad)

    @classmethod
    def of(cls, ledger: Ledger, requests: Iterable[Request]) -> "Guests":
        """These."""
        guests = cls()
        for request in requests:
            num_left = max(1, request.terms.num_planned_tokens - request.num_output_tokens)
            num_tokens = ledger.final_tokens(request)
            guests.num_requests += 1
            guests.num_tokens += num_tokens
            guests.num_output_tokens += num_left
            guests.most_output_tokens = max(guests.most_output_tokens, num_left)
            guests.most_tokens = max(guests.most_tokens, num_tokens)
            guests.prompts.add_prefill(len(request.token_ids), 0)
        return guests

    def num_rounds(self, max_num_seqs: int, max_num_tokens: int) -> int:
        """Tokens that come one after the other until all are over, with so many seats and so much
        memory (Graham's bound for any order).
        """
        num_at_once = min(max_num_seqs, max_num_tokens // max(1, self.most_tokens))
        return self.most_output_tokens + self.num_output_tokens // max(1, num_at_once)


class Forecast:
    """Of a ledger as it is `now`, with so much in flight, beside guests."""

    def __init__(
        self, ledger: Ledger, pricing: Pricing, now: float, ahead: Ahead, guests: Guests
    ) -> None:
        self._ledger, self._pricing, self._now, self._guests = ledger, pricing, now, guests
        self._ahead = ahead
        self.moment = now, ahead
        limit, decodes = ledger.seconds_per_token, StepLoad()
        if len(ledger) > 1:
            decodes = pricing.share_of(len(ledger), ledger.num_tokens)
        elif len(ledger.demand):
            limit = inf  # Nobody decodes beside the prompt of one who is alone.
        self._busy_s = min(pricing.longest_step_s(limit, decodes), ledger.step_s)
        self._pace = self._pace_of(decodes)
        self._calm_s = pricing.model.step_seconds(self._decodes_of_all())
        self._no_demand_at = self._end_of_demand()

    @cached_property
    def ends(self) -> list[float]:
        """When the promised requests are over, one after the other."""
        return [end for end, _ in self._by_end]

    @property
    def last_end(self) -> float:
        """When all of them are."""
        return max(self.ends[-1] if self.ends else self._now, self._no_demand_at)

    def end_of_guests(self, max_num_seqs: int, num_blocks: int) -> float:
        """When guests are over as well, with so many seats and so much memory."""
        guests, ledger = self._guests, self._ledger
        num_rounds = guests.num_rounds(max_num_seqs, num_blocks * ledger.block_size)
        return (
            self.last_end + num_rounds * self._gap_s(self._calm_s) + self._alone_s(guests.prompts)
        )

    def at(self, time: float) -> Outlook:
        """What is promised then."""
        index = bisect_right(self.ends, time)
        num_tokens, num_blocks, seconds_per_token = self._sums[index]
        requests = [request for _, request in self._by_end[index:]]
        demand = self._ledger.demand.after(self._work_by(time)) if requests else Demand()
        return Outlook(self._ledger, requests, num_tokens, num_blocks, seconds_per_token, demand)

    def ahead_at(self, time: float) -> Ahead:
        """What is in flight then, some of it perhaps since now."""
        in_flight, model = self._pricing.num_in_flight, self._pricing.model
        depth = max(in_flight, len(model.stages))
        if self._is_busy_at(time):  # One step after the other comes back.
            next_s, back_s = self._busy_s * -(-depth // in_flight), self._busy_s * depth
        else:
            next_s = back_s = self._calm_step_s(time) * depth
        passed_s, trip_s = time - self._now, model.trip_overhead_s if back_s else 0.0
        return Ahead(
            max(next_s, self._ahead.next_s - passed_s),
            max(back_s + trip_s, self._ahead.back_s - passed_s),
        )

    def _is_busy_at(self, time: float) -> bool:
        settled_at = self._no_demand_at + self._pricing.num_in_flight * self._busy_s
        return len(self._ledger.demand) > 0 and time < settled_at

    def _calm_step_s(self, time: float) -> float:
        if time >= self.last_end and not self._guests.num_requests:
            return 0.0
        guard_s = self._ledger.guard_s(time, self._pricing.max_in_flight)
        return min(self._calm_s + self._prompts_s, max(guard_s, self._stretched_s))

    @cached_property
    def _stretched_s(self) -> float:
        """What planning lets prompts of guests make of a step at least."""
        pricing, least = self._pricing, StepLoad()
        least.add_prefill(pricing.least_chunk, self._guests.most_tokens)
        return max(DECODES_STRETCH * self._calm_s, pricing.model.step_seconds(least))

    def _work_by(self, time: float) -> float:
        """Prefill work that has been planned by then."""
        pace = self._pace
        if pace is None or time <= pace.start:
            return 0.0
        return (time - pace.start) // pace.step_s * pace.work

    def _pace_of(self, decodes: StepLoad) -> Pace | None:
        if not len(self._ledger.demand):
            return None
        pricing = self._pricing
        capacity = pricing.capacity(self._busy_s, decodes, self._ledger.longest_prompt)
        if capacity.work <= 0:
            return None
        wait_s = self._ahead.wait_s(self._busy_s, pricing.max_in_flight)
        return pricing.pace(capacity, self._now + wait_s)

    def _end_of_demand(self) -> float:
        """When the last of its prompts is computed: by its pace, or else as promised."""
        demand = self._ledger.demand
        if not len(demand):
            return self._now + self._ahead.back_s
        return demand.last_due if self._pace is None else self._pace.end_of(demand.work)

    def _decodes_of_all(self) -> StepLoad:
        ledger, guests = self._ledger, self._guests
        num_requests = len(ledger) + guests.num_requests
        return self._pricing.share_of(num_requests, ledger.num_tokens + guests.num_tokens)

    @cached_property
    def _by_end(self) -> list[tuple[float, Request]]:
        ends = list(self._each_end())
        ends.sort(key=lambda pair: pair[0])
        return ends

    @cached_property
    def _sums(self) -> list[tuple[int, int, float]]:
        """Tokens, blocks and the tightest time per token, of all but so many who ended first."""
        ledger = self._ledger
        requests = [request for _, request in reversed(self._by_end)]
        tokens = accumulate((ledger.final_tokens(r) for r in requests), initial=0)
        blocks = accumulate((ledger.final_blocks(r) for r in requests), initial=0)
        limits = accumulate((r.terms.seconds_per_token for r in requests), min, initial=inf)
        return list(zip(tokens, blocks, limits, strict=True))[::-1]

    def _each_end(self) -> Iterator[tuple[float, Request]]:
        ledger, pace = self._ledger, self._pace
        firsts = ledger.demand.ends(pace) if pace is not None else {}
        back_at = self._now + self._ahead.back_s
        last_first = self._no_demand_at + self._dueless_s
        for request in ledger.requests:
            num_left = max(1, request.terms.num_planned_tokens - request.num_output_tokens)
            if (start := firsts.get(request)) is not None:
                num_left -= 1
            elif _has_prompt_left(request):
                start, num_left = last_first, num_left - 1
            else:
                start = back_at
            end = self._end_of_decodes(start, num_left)
            yield min(end, start + num_left * request.terms.seconds_per_token), request

    @cached_property
    def _dueless_s(self) -> float:
        """What prompts take that are promised, but not by any time: behind decodes of guests."""
        load, demand = StepLoad(), self._ledger.demand
        for request in self._ledger.requests:
            if _has_prompt_left(request) and request not in demand:
                num_computed = request.num_computed_tokens
                load.add_prefill(len(request.token_ids) - num_computed, num_computed)
        if not load.num_prefill_tokens:
            return 0.0
        num_rounds = 1 + self._guests.most_output_tokens
        return num_rounds * self._gap_s(self._calm_s) + self._alone_s(load)

    def _alone_s(self, prompts: StepLoad) -> float:
        """What prompts take in steps that hold nothing else that gets on."""
        pricing, decodes = self._pricing, self._decodes_of_all()
        chunk = pricing.model.tokens_within(self._stretched_s, decodes, self._guests.most_tokens)
        chunk = min(max(chunk, pricing.least_chunk), pricing.max_num_tokens)
        num_steps = self._guests.num_requests + 1 + prompts.num_prefill_tokens // chunk
        return num_steps * self._calm_s + pricing.model.work_seconds(prompts)

    def _end_of_decodes(self, start: float, num_tokens: int) -> float:
        """At the latest: while prompts are due, steps are as long as they may be; then as long as
        decodes take, and whatever prompts there are delays them once.
        """
        busy_gap_s = self._gap_s(self._busy_s)
        busy_s = max(0.0, self._no_demand_at - start)
        if num_tokens * busy_gap_s <= busy_s:
            return start + num_tokens * busy_gap_s
        num_tokens -= int(busy_s // busy_gap_s)
        start = max(start, self._no_demand_at)
        return start + num_tokens * self._gap_s(self._calm_s) + self._prompts_s

    @cached_property
    def _guests_s(self) -> float:
        return self._pricing.model.work_seconds(self._guests.prompts)

    @cached_property
    def _prompts_s(self) -> float:
        return self._guests_s + self._dueless_s

    def _gap_s(self, step_s: float) -> float:
        """Between two tokens, with steps of that time."""
        pricing = self._pricing
        if step_s == inf:
            return inf
        depth = max(pricing.max_in_flight, len(pricing.model.stages))
        return depth * step_s + pricing.model.trip_overhead_s


def _has_prompt_left(request: Request) -> bool:
    num_left = len(request.token_ids) - request.num_computed_tokens
    return num_left > 1 or (request.first_token_time == NEVER and not request.is_token_in_flight)
