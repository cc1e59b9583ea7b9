"""What the sampler knows about one row of logits."""

from dataclasses import dataclass

from shardline_scheduler.plan import SamplingParams


@dataclass(slots=True)
class SampleRow:
    """A request that draws a token: its parameters and its tokens so far, the prompt first."""

    sampling: SamplingParams
    token_ids: list[int]
    num_prompt_tokens: int

    @property
    def num_output_tokens(self) -> int:
        """Tokens drawn so far, which is the index of the one to be drawn now."""
        return len(self.token_ids) - self.num_prompt_tokens
