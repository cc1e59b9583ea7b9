"""What the sampler knows about one row of logits."""

from dataclasses import dataclass, field

from shardline_scheduler.plan import SamplingParams


@dataclass(slots=True)
class SampleRow:
    """A request that draws a token: its parameters and its tokens so far, the prompt first.

    `adjusts_logits` says that something may have to change its logits before the temperature does.
    """

    sampling: SamplingParams
    token_ids: list[int]
    num_prompt_tokens: int
    adjusts_logits: bool = field(init=False)

    def __post_init__(self) -> None:
        sampling = self.sampling
        self.adjusts_logits = (
            bool(sampling.logit_bias)
            or sampling.min_tokens > 0
            or sampling.repetition_penalty != 1.0
            or sampling.presence_penalty != 0.0
            or sampling.frequency_penalty != 0.0
        )

    @property
    def num_output_tokens(self) -> int:
        """Tokens drawn so far, which is the index of the one to be drawn now."""
        return len(self.token_ids) - self.num_prompt_tokens
