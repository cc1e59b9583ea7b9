"""From logits to tokens."""

from shardline_shards.sampling.logprobs import prompt_logprobs
from shardline_shards.sampling.rows import SampleRow
from shardline_shards.sampling.sampler import sample

__all__ = ["SampleRow", "prompt_logprobs", "sample"]
