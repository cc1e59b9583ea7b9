"""What one step can afford."""

from dataclasses import dataclass
from typing import Protocol, Self

from .plan import StepPlan


@dataclass(slots=True)
class StepLoad:
    """The work of a step so far, in the terms that its time depends on.

    A single token after some context is a decode; `decode_context` sums the contexts of those.
    `prefill_context` sums, over the tokens of the longer chunks, the tokens before each of them.
    """

    num_prefill_tokens: int = 0
    num_decodes: int = 0
    decode_context: int = 0
    prefill_context: int = 0

    @classmethod
    def of(cls, plan: StepPlan) -> Self:
        """The work of a whole step."""
        load = cls(0, len(plan.decodes), sum(plan.decodes.num_computed_tokens), 0)
        for chunk in plan.chunks:
            load.add(chunk.num_scheduled_tokens, chunk.num_computed_tokens)
        return load

    @property
    def num_tokens(self) -> int:
        """All tokens of the step."""
        return self.num_prefill_tokens + self.num_decodes

    @property
    def has_prompts(self) -> bool:
        """Whether there is more in it than decodes."""
        return self.num_prefill_tokens > 0

    def copy(self) -> "StepLoad":
        """The same, to be changed by itself."""
        return StepLoad(
            self.num_prefill_tokens, self.num_decodes, self.decode_context, self.prefill_context
        )

    def add(self, num_tokens: int, context: int) -> None:
        """Take `num_tokens` more, of a request that has `context` tokens computed before them."""
        if num_tokens == 1 and context:
            self.num_decodes += 1
            self.decode_context += context
        else:
            self.add_prefill(num_tokens, context)

    def add_prefill(self, num_tokens: int, context: int) -> None:
        """Take a chunk."""
        self.num_prefill_tokens += num_tokens
        self.prefill_context += num_tokens * context + num_tokens * (num_tokens - 1) // 2


class StepCost(Protocol):
    """Says how much more a step may take."""

    def affordable_tokens(self, load: StepLoad, context: int, num_wanted: int) -> int:
        """Of the next `num_wanted` tokens of a request with `context` tokens computed, how many
        the step may still take.

        0 or less means none. Must be at least 1 for an empty load, or nothing ever runs.
        """
        ...


class TokenBudget:
    """A fixed number of tokens a step, whatever they cost."""

    def __init__(self, max_num_batched_tokens: int) -> None:
        self._max_num_batched_tokens = max_num_batched_tokens

    def affordable_tokens(self, load: StepLoad, context: int, num_wanted: int) -> int:
        """What is left of the budget."""
        return min(num_wanted, self._max_num_batched_tokens - load.num_tokens)
