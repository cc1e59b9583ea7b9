"""What happened to each request. Times are in seconds."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise


class Outcome(StrEnum):
    """How a request ended; EXPIRED: the server ended it, since its deadline could not be kept."""

    OK = "ok"
    REFUSED = "refused"
    EXPIRED = "expired"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One request; times count from the run's start.

    `start_s` is when it was meant to be sent, `sent_s` when it was. `token_times_s` are the moments
    when pieces with tokens came, `token_counts` how many each brought: arrays of numbers, 10 bytes
    a piece, since a long run has millions. `num_output_tokens` is the server's count, or that of
    the pieces if it has none. `is_told_met` is what the server said of its budget, if it did,
    `predicted_ttft_ms` and `told_ttft_ms` what it thought and found of its first token.
    """

    start_s: float
    sent_s: float
    end_s: float
    outcome: Outcome
    class_name: str = "standard"
    token_times_s: Sequence[float] = ()
    token_counts: Sequence[int] = ()
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    error: str | None = None
    retry_after_s: float | None = None
    is_told_met: bool | None = None
    predicted_ttft_ms: float | None = None
    told_ttft_ms: float | None = None

    @property
    def ttft_s(self) -> float | None:
        """To the first token."""
        return self.token_times_s[0] - self.start_s if self.token_times_s else None

    @property
    def e2e_s(self) -> float | None:
        """To the last token."""
        return self.token_times_s[-1] - self.start_s if self.token_times_s else None

    @property
    def tpot_s(self) -> float | None:
        """Mean per output token after the first: (E2E - TTFT) / (tokens - 1)."""
        if not self.token_times_s or self.num_output_tokens < 2:
            return None
        return (self.token_times_s[-1] - self.token_times_s[0]) / (self.num_output_tokens - 1)

    @property
    def itl_s(self) -> list[float]:
        """Between one piece with tokens and the next."""
        return [after - before for before, after in pairwise(self.token_times_s)]
