"""How long outputs turn out to be, by class: a histogram over lengths that fades."""

from bisect import bisect_right

from .budget import Priority
from .request import Request

_EDGES = sorted({round(1.15**power) for power in range(100)})
_FADING = 0.999
_MIN_SAMPLES = 20
_QUANTILE = 0.9


class OutputLengths:
    """Plans with a length that nine outputs of ten do not exceed, and never beyond `max_tokens`."""

    def __init__(self) -> None:
        self._counts = {priority: [0.0] * (len(_EDGES) + 1) for priority in Priority}

    def observe(self, request: Request) -> None:
        """A request has ended by itself."""
        counts = self._counts[request.budget.priority]
        for i, count in enumerate(counts):
            counts[i] = count * _FADING
        counts[bisect_right(_EDGES, request.num_output_tokens - 1)] += 1.0

    def planned(self, request: Request) -> int:
        """Output tokens to plan with, in all: a quantile over those that were as long as this one
        already is. All that may come, where nothing can end it early or too little is known.
        """
        sampling, num_tokens = request.sampling, request.num_output_tokens
        if not sampling.stop_token_ids:
            return sampling.max_tokens
        counts = self._counts[request.budget.priority]
        first = bisect_right(_EDGES, num_tokens)
        total = sum(counts[first:])
        if total < _MIN_SAMPLES:
            return sampling.max_tokens
        left = total * _QUANTILE
        for i in range(first, len(_EDGES)):
            left -= counts[i]
            if left <= 0:
                return max(num_tokens + 1, min(_EDGES[i], sampling.max_tokens))
        return sampling.max_tokens
