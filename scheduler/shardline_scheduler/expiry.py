"""When it becomes certain that a budget cannot be kept any more."""

from heapq import heappop, heappush
from math import inf

from .cost import StepLoad
from .cost_model import PipeModel
from .request import NEVER, Request, RequestState

# Certain is what even this part of the expected times is too slow for.
BEST_CASE = 0.9


class Expiries:
    """Requests by the time at which they become hopeless. That time moves as they get on, mostly
    later, and is looked up again when it has come: every operation is O(log n).
    """

    def __init__(self, model: PipeModel, num_trips_at_once: float = 1) -> None:
        self._model = model
        self._num_trips = num_trips_at_once
        self._heap: list[tuple[float, int, Request]] = []

    @property
    def next_time(self) -> float:
        """When to look next; infinity if there is nothing to look for."""
        while self._heap and self._heap[0][2].state is RequestState.FINISHED:
            heappop(self._heap)
        return self._heap[0][0] if self._heap else inf

    def watch(self, request: Request) -> None:
        """A promised request, now and whenever its time may have moved to an earlier one."""
        time = self._hopeless_at(request)
        if time < inf:
            heappush(self._heap, (time, request.sequence, request))

    def pop_hopeless(self, now: float) -> list[Request]:
        """Those that cannot keep their budgets any more; each is watched no longer."""
        hopeless: dict[Request, None] = {}
        while self.next_time < now:
            request = heappop(self._heap)[2]
            if not request.terms.is_promised:
                continue
            if self._hopeless_at(request) < now:
                hopeless[request] = None
            else:
                self.watch(request)
        return list(hopeless)

    def _hopeless_at(self, request: Request) -> float:
        budget, sampling = request.budget, request.sampling
        token_s = self._best_token_s(request)
        deadline = first_by = inf
        if budget.deadline_ms is not None:
            deadline = request.arrival_time + budget.deadline_ms / 1e3
            deadline -= _least_tokens(request) * token_s
        if request.first_token_time == NEVER:
            if budget.ttft_ms is not None:
                first_by = request.arrival_time + budget.ttft_ms / 1e3
            return min(first_by, deadline) - self._best_prefill_s(request)
        again_s = self._best_replay_s(request)
        deadline -= again_s
        if budget.tpot_ms is None or sampling.max_tokens == 1:
            return deadline
        # The mean of all tokens that may come: those still to come can make up for the others.
        late = request.first_token_time + budget.tpot_ms / 1e3 * (sampling.max_tokens - 1)
        num_left = sampling.max_tokens - request.num_output_tokens - request.num_tokens_in_flight
        return min(deadline, late - again_s - num_left * token_s)

    def _best_token_s(self, request: Request) -> float:
        if not self._model.is_ready:
            return 0.0
        decode = StepLoad(0, 1, len(request.token_ids), 0)
        trip_s = self._model.expected_trip_seconds(decode)
        return BEST_CASE * self._model.gap_seconds(trip_s, self._num_trips)

    def _best_replay_s(self, request: Request) -> float:
        """What it has to compute again before its next token, whose own step is not counted."""
        is_behind = len(request.token_ids) - request.num_computed_tokens > 1
        return self._best_prefill_s(request) if is_behind else 0.0

    def _best_prefill_s(self, request: Request) -> float:
        """What is left to plan of its prompt; what is in flight may be back at once."""
        context = max(request.num_computed_tokens, request.terms.num_cached_tokens)
        num_tokens = len(request.token_ids) - context
        if num_tokens <= 0 or not self._model.is_ready:
            return 0.0
        return BEST_CASE * self._model.expected_prefill_seconds(num_tokens, context)


def _least_tokens(request: Request) -> int:
    """Tokens that it has yet to say after those that may be back at once, come what may."""
    sampling = request.sampling
    least = sampling.max_tokens
    if sampling.stop_token_ids:
        least = max(1, sampling.min_tokens)
    return max(0, least - request.num_output_tokens - max(1, request.num_tokens_in_flight))
