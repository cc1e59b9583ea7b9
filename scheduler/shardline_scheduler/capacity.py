"""What the pipe can do for prompts while it keeps its decodes in time."""

from dataclasses import dataclass
from math import inf, sqrt

from .cost import StepLoad
from .cost_model import PipeModel
from .demand import Pace

# A step that holds nothing else takes so many tokens of a prompt at least, where eight times as
# many are allowed.
_LEAST_CHUNK = 32
# The part of a limit on the time per token that planning uses up.
USED_PART = 0.95


@dataclass(frozen=True, slots=True)
class Capacity:
    """Of steps that take up to `step_s` of the slowest stage, `decodes_s` of it their decodes, so
    that each can do `work` seconds of prefill work; 0 is none.
    """

    step_s: float
    decodes_s: float
    work: float


class Pricing:
    """Turns loads into times, for `max_in_flight` steps of `max_num_tokens` tokens each, between
    which the decodes are dealt.

    Where `num_in_flight` are more than that, some are planned ahead, and what a way takes beside
    computing is hidden behind computing; but for first tokens.
    """

    def __init__(
        self,
        model: PipeModel,
        max_in_flight: int,
        max_num_tokens: int,
        *,
        num_in_flight: int | None = None,
    ) -> None:
        self.model = model
        self.max_in_flight = max_in_flight
        self.max_num_tokens = max_num_tokens
        self.num_in_flight = num_in_flight or max_in_flight
        self._num_trips = self.num_in_flight / max_in_flight
        self.least_chunk = _LEAST_CHUNK if max_num_tokens >= 8 * _LEAST_CHUNK else 1

    def share_of(self, num_decodes: int, context: int) -> StepLoad:
        """A step's part of that many decodes with that many tokens of context in all."""
        in_flight = self.max_in_flight
        return StepLoad(0, -(-num_decodes // in_flight), -(-context // in_flight), 0)

    def longest_step_s(self, seconds_per_token: float, decodes: StepLoad) -> float:
        """How long a step may take, beside its decodes, while every token comes in time."""
        num_tokens = self.max_num_tokens - decodes.num_decodes
        full = StepLoad(0, decodes.num_decodes, decodes.decode_context, 0)
        full.add_prefill(num_tokens, 0)
        return min(self._step_s_for(seconds_per_token), self.model.most_step_seconds(full))

    def _step_s_for(self, seconds_per_token: float) -> float:
        per_token, overhead_s = USED_PART * seconds_per_token, self.model.trip_overhead_s
        return min(per_token, self._num_trips * per_token - overhead_s) / self.max_in_flight

    def step_s_of_prompt(self, decodes: StepLoad, num_tokens: int, context: int) -> float:
        """The time of a step that is sure to take so many tokens of a prompt at once."""
        whole = StepLoad(0, decodes.num_decodes, decodes.decode_context, 0)
        whole.add_prefill(min(num_tokens + 1, self.max_num_tokens), context)
        return self.model.step_seconds(whole) + self._lost_s(num_tokens + context)

    def soonest_step_s(self, decodes: StepLoad, num_tokens: int, context: int) -> float:
        """The time of steps, each with these decodes, that have so many tokens of a prompt through
        all p stages soonest.

        Of a stage's time S for them all and o for a step without, m steps take
        (m + p - 1) (S / m + o), which is least for m = √((p - 1) S / o). One stage takes them at
        once: infinity.
        """
        model, num_behind = self.model, len(self.model.stages) - 1
        if not num_behind:
            return inf
        whole_s, least_s = model.prefill_seconds(num_tokens, context), model.step_seconds(decodes)
        if not whole_s:
            return inf
        most_steps = max(1, num_tokens // self.least_chunk)
        num_steps = sqrt(num_behind * whole_s / least_s) if least_s else inf
        return least_s + whole_s / min(max(1.0, num_steps), most_steps)

    def capacity(self, step_s: float, decodes: StepLoad, longest: int) -> Capacity:
        """Of steps of that time, each with these decodes, for prompts of up to `longest` tokens."""
        # With several stages another one may be the slowest behind long contexts, with less work
        # in the measure of the first.
        work = self._work_within(step_s, decodes, 0)
        if len(self.model.stages) > 1:
            work = min(work, self._work_within(step_s, decodes, longest))
        work = max(work / 2, work - self._lost_s(longest))
        return Capacity(step_s, self.model.step_seconds(decodes), work)

    def _work_within(self, step_s: float, decodes: StepLoad, context: int) -> float:
        num_tokens = self.model.tokens_within(step_s, decodes, context)
        num_tokens = min(num_tokens, self.max_num_tokens - decodes.num_decodes)
        return self.model.prefill_seconds(num_tokens, context) if num_tokens > 0 else 0.0

    def _lost_s(self, context: int) -> float:
        """What a step has no use for, at most: a part of a token, and a last one by itself.

        Tokens cost more the more there are before them.
        """
        return self.model.prefill_seconds(2, context)

    def pace(self, capacity: Capacity, start: float) -> Pace:
        """How prefill work gets on from `start`, the pipe being full; there must be capacity.

        Planning adds what one step in ten exceeds. Over many steps that averages out, but for what
        makes all of them slow: half of it is kept.
        """
        start += self.model.trip_overhead_s
        margin = self.model.work_margin
        spared = margin / 2 / (1 + margin)
        return Pace(start, capacity.step_s, capacity.work, self.max_in_flight, spared)

    def spread_of(self, decodes: StepLoad) -> float:
        """The part of their expected time that planning adds for steps with these decodes."""
        expected_s = self.model.expected_step_seconds(decodes)
        return self.model.step_seconds(decodes) / expected_s - 1 if expected_s > 0 else 0.0

    def token_s(self, decodes: StepLoad) -> float:
        """The time per token of steps that only decode."""
        step_s, trip_s = self.model.step_seconds(decodes), self.model.trip_seconds(decodes)
        return max(self.max_in_flight * step_s, self.model.gap_seconds(trip_s, self._num_trips))
