"""How much a step may take on: as many tokens as one time that all steps in flight share.

Unequal steps leave stages idle (a cycle of m steps takes max(Σ τ, m · max τ)), so the time moves
slowly, and no step uses up the slack of a single request. While first tokens are promised, it is
the time that admission found feasible; without, decodes set it.
"""

from dataclasses import dataclass
from math import inf

from .capacity import Pricing
from .cost import StepLoad

# A step with decodes in it takes at most so many times what they alone take, for a prompt that
# nobody promised anything: gaps between tokens stay even.
DECODES_STRETCH = 2.0
# Many waiting prompts may stretch it more: this part of all their tokens at a time (gLLM), while it
# takes at most so many times what decodes take once they all decode. Measured by those that do, few
# decodes would make for small steps, in which few prompts come to their end: 8 or 9 of 32 streams
# ran.
_STEPS_FOR_BACKLOG = 8
_BACKLOG_STRETCH = 3.0
_LARGEST_MOVE = 1.1


@dataclass(frozen=True, slots=True)
class Prompts:
    """What a step may choose from: so many prompts, and tokens of theirs to be computed.

    `num_joining` of them have a seat, or one is free for them. `num_decodes` others are decoding,
    in this step or in one that is in flight; `has_promised_decodes` is whether somebody's tokens
    have to come in time meanwhile.
    """

    count: int
    num_tokens: int
    num_joining: int
    num_decodes: int
    has_promised_decodes: bool


class TimeTarget:
    """A StepCost. Until the model has been measured, only the number of tokens is limited."""

    def __init__(self, pricing: Pricing) -> None:
        self.step_s = inf
        self._with_decodes_s = inf  # the last one that decodes had set, infinity after others
        self._pricing = pricing
        self._always = True

    def aim(self, load: StepLoad, longest_s: float, prompts: Prompts) -> None:
        """For a step of up to `longest_s` that holds its decodes, nobody's first token being
        promised.
        """
        if not self._pricing.model.is_ready:
            return
        if not load.num_decodes and not prompts.num_decodes:
            soonest_s = self._pricing.soonest_step_s(StepLoad(), prompts.num_tokens, 0)
            self.keep(min(soonest_s, longest_s))
            return
        decodes = load if load.num_decodes else self._pricing.share_of(prompts.num_decodes, 0)
        decodes_s = self._pricing.model.step_seconds(decodes)
        wanted = DECODES_STRETCH * decodes_s
        if prompts.count > 1:
            num_tokens = prompts.num_tokens // _STEPS_FOR_BACKLOG
            part = self._pricing.model.prefill_seconds(num_tokens, 0)
            joined = self._pricing.share_of(prompts.num_decodes + prompts.num_joining, 0)
            joined.decode_context = load.decode_context
            joined_s = self._pricing.model.step_seconds(joined)
            wanted = max(wanted, min(decodes_s + part, _BACKLOG_STRETCH * joined_s))
        if self._with_decodes_s < inf:
            last_s = self._with_decodes_s
            wanted = max(wanted, last_s / _LARGEST_MOVE, decodes_s)
            wanted = min(wanted, last_s * _LARGEST_MOVE)
        self.step_s = self._with_decodes_s = min(wanted, longest_s)

    def keep(self, step_s: float) -> None:
        """For a step that this time was found to suit, whatever decodes of guests there are."""
        self.step_s, self._with_decodes_s = step_s, inf

    def insist(self, *, always: bool) -> None:
        """Whether a step with nothing else in it takes a few tokens however long they are."""
        self._always = always

    def affordable_tokens(self, load: StepLoad, context: int, num_wanted: int) -> int:
        """As many as fit the time."""
        pricing = self._pricing
        most = min(num_wanted, pricing.max_num_tokens - load.num_tokens)
        if most < 1 or not pricing.model.is_ready:
            return most
        num_tokens = pricing.model.tokens_within(self.step_s, load, context)
        if num_tokens >= most:
            return most
        if num_tokens == 1 and context and not self._has_time_for_decode(load, context):
            num_tokens = 0
        is_needed = self._always and not load.num_tokens
        return max(num_tokens, min(most, pricing.least_chunk) if is_needed else 0)

    def _has_time_for_decode(self, load: StepLoad, context: int) -> bool:
        """A single token behind others is computed like a decode, and may take longer than it does
        as a part of a chunk.
        """
        with_it = load.copy()
        with_it.add(1, context)
        return self._pricing.model.step_seconds(with_it) <= self.step_s
