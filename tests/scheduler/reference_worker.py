"""A worker without a model: executes plans on plain lists, and trusts nothing.

KV memory is a dict from slot to the whole token prefix that the slot was computed from, which is
what a key and value depend on. So a wrongly shared block, or one that is reused too early, shows
as a slot that holds another prefix than its reader's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from zlib import crc32

from shardline_scheduler.plan import (
    LAST_DRAWN,
    NewRequest,
    PromptLogprobs,
    SamplingParams,
    StepPlan,
    StepResult,
    TokenLogprobs,
)

from .parts import Part, parts_of

VOCAB_SIZE = 5


def draw(prefix: Sequence[int], num_prompt_tokens: int, sampling: SamplingParams) -> int:
    """A token that depends on everything before it, on the seed, and on nothing else."""
    masked = len(prefix) - num_prompt_tokens < sampling.min_tokens
    banned = sampling.stop_token_ids if masked else ()
    allowed = [token for token in range(VOCAB_SIZE) if token not in banned]
    return allowed[crc32(bytes(prefix), sampling.seed) % len(allowed)]


def solo(prompt: Sequence[int], sampling: SamplingParams) -> list[int]:
    """What the request gives when nothing else is there: the oracle."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + sampling.max_tokens:
        tokens.append(draw(tokens, len(prompt), sampling))
        index = len(tokens) - len(prompt) - 1
        if tokens[-1] in sampling.stop_token_ids and index >= sampling.min_tokens:
            break
    return tokens[len(prompt) :]


def prompt_logprob(prefix: Sequence[int]) -> TokenLogprobs:
    """Stands for the logprob of the last token of `prefix`."""
    return TokenLogprobs(prefix[-1], -float(crc32(bytes(prefix))), [])


@dataclass
class Known:
    """What a worker knows of a request."""

    request: NewRequest
    token_ids: list[int]
    num_computed: int | None = None
    last_drawn: int | None = None
    slots: list[int] = field(default_factory=list)


class ReferenceWorker:
    """Executes plans in the order of their ids."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.known: dict[int, Known] = {}
        self.memory: dict[int, tuple[int, ...]] = {}
        self.next_step_id = 0
        self.next_index = 0

    def execute(self, plan: StepPlan) -> StepResult:
        assert plan.step_id == self.next_step_id
        self.next_step_id += 1
        for index in plan.released:
            del self.known[index]
        for new in plan.new_requests:
            assert new.request_index == self.next_index, "indexes are given in order, never twice"
            self.next_index += 1
            self.known[new.request_index] = Known(new, list(new.token_ids))
        parts = parts_of(plan)
        for part in parts:
            self._learn(part)
        # Whatever a step reads besides its own tokens was written by an earlier step.
        for part in parts:
            self._assert_written(part.request_index, part.num_computed_tokens)
        for part in parts:
            self._write(part)
        for part in parts:
            self._assert_written(part.request_index, part.end)
        return self._result(plan.step_id, parts)

    def _learn(self, part: Part) -> None:
        known = self.known[part.request_index]
        assert part.num_scheduled_tokens >= 1
        if known.num_computed is None:  # A prefix hit covers whole blocks and not the last token.
            assert part.num_computed_tokens % self.block_size == 0
            known.num_computed = part.num_computed_tokens
        assert known.num_computed == part.num_computed_tokens, "chunks follow each other"
        known.num_computed += part.num_scheduled_tokens
        for token in part.token_ids:
            assert known.last_drawn is not None, "only drawn tokens are added"
            assert token in (LAST_DRAWN, known.last_drawn), "another token than was drawn"
            known.token_ids.append(known.last_drawn)
            known.last_drawn = None
        assert part.samples == (known.num_computed == len(known.token_ids))
        for block_id in part.block_ids:
            assert 0 <= block_id < self.num_blocks
            first = block_id * self.block_size
            known.slots += range(first, first + self.block_size)
        assert known.num_computed <= min(len(known.token_ids), len(known.slots))

    def _write(self, part: Part) -> None:
        known = self.known[part.request_index]
        start = part.num_computed_tokens
        for position in range(start, part.end):
            self.memory[known.slots[position]] = tuple(known.token_ids[: position + 1])

    def _assert_written(self, index: int, num_tokens: int) -> None:
        known = self.known[index]
        for position in range(num_tokens):
            assert self.memory[known.slots[position]] == tuple(known.token_ids[: position + 1])

    def _result(self, step_id: int, parts: list[Part]) -> StepResult:
        tokens, prompt_logprobs = [], []
        for part in parts:
            known = self.known[part.request_index]
            sampling, num_prompt = known.request.sampling, known.request.num_prompt_tokens
            if sampling.num_prompt_logprobs is not None:
                start = part.num_computed_tokens + 1
                end = min(start + part.num_scheduled_tokens, num_prompt)
                logprobs = [prompt_logprob(known.token_ids[: i + 1]) for i in range(start, end)]
                if logprobs:
                    piece = PromptLogprobs(part.request_index, start, logprobs)
                    prompt_logprobs.append(piece)
            if part.samples:
                token = known.last_drawn = draw(known.token_ids, num_prompt, sampling)
                tokens.append(token)
        return StepResult(step_id, tokens, {}, prompt_logprobs)
