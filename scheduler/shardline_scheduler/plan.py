"""The data that crosses from the engine to the workers and back: what every rank does in one step.

Plain frozen structures, no behaviour and no policy. They are encoded as msgpack on the wire.
A plan is a delta: a request travels in full once, and as a few integers in every later step.
"""

from collections.abc import Sequence

from msgspec import Struct

# Among a request's tokens in a plan: the one that the workers drew for it last. Only they know it
# while the step that draws it is in flight.
LAST_DRAWN = -1


class SamplingParams(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the tokens of one request are chosen; already validated, nothing is optional by accident.

    `temperature` 0 means greedy. `top_k` 0 means the whole vocabulary. `seed` is always set: the
    front end draws one when the client gave none, so that a replay gives the same tokens.
    `stop_token_ids` holds every id that ends the request, the model's end-of-sequence ids included
    unless the client asked to ignore them; none of them can be drawn before `min_tokens` tokens.
    `num_logprobs` is the number of alternatives beside the chosen token (None: no logprobs at all).
    """

    max_tokens: int
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None


class TokenLogprobs(Struct, frozen=True, array_like=True):
    """Log-probability (natural log) of one token, and of the likeliest ones, best first."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


class NewRequest(Struct, frozen=True, array_like=True):
    """A request that the workers do not know yet.

    `request_index` stands for the request in all later plans; an index is never used twice.
    `token_ids` holds the prompt and, for a request that comes back after a preemption or a fault,
    the tokens emitted so far; the first `num_prompt_tokens` of them are the prompt.
    """

    request_index: int
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams


class Decodes(Struct, frozen=True, array_like=True):
    """Requests that compute one token each and draw the next one, as columns of one length.

    Behind its `num_computed_tokens[i]` tokens, request `request_indexes[i]` gets `token_ids[i]`,
    drawn before but not told to the workers yet, or `LAST_DRAWN`. `new_blocks` are pairs (i, id):
    blocks that are appended to its block table.
    """

    request_indexes: list[int] = []
    num_computed_tokens: list[int] = []
    token_ids: list[int] = []
    new_blocks: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self.request_indexes)


class Chunk(Struct, frozen=True, array_like=True, gc=False):
    """Tokens [num_computed, num_computed + num_scheduled) of a request, which the workers know: of
    its prompt, or of what is computed again.

    `block_ids` are appended to its block table. `samples` says that a token is drawn from the
    logits of the last one.
    """

    request_index: int
    num_computed_tokens: int
    num_scheduled_tokens: int
    block_ids: Sequence[int]
    samples: bool


class StepPlan(Struct, frozen=True, array_like=True, tag=True):
    """What every rank does in one step, applied in this order: forget, learn, compute.

    `released` are the indexes of requests that the workers forget (finished, aborted, preempted).
    The tokens of `decodes` come first, then those of `chunks`. Plans are executed strictly in the
    order of `step_id`, so a block that one plan frees may be written by the next one.
    """

    step_id: int
    released: list[int] = []
    new_requests: list[NewRequest] = []
    decodes: Decodes = Decodes()
    chunks: list[Chunk] = []

    @property
    def num_tokens(self) -> int:
        """Tokens that are computed."""
        return len(self.decodes) + sum(chunk.num_scheduled_tokens for chunk in self.chunks)

    @property
    def request_indexes(self) -> list[int]:
        """Of everybody for whom something is computed, in this order."""
        return self.decodes.request_indexes + [chunk.request_index for chunk in self.chunks]

    @property
    def drawing_indexes(self) -> list[int]:
        """Of everybody for whom a token is drawn, in the order in which the result tells them."""
        chunks = [chunk.request_index for chunk in self.chunks if chunk.samples]
        return self.decodes.request_indexes + chunks


class PromptLogprobs(Struct, frozen=True, array_like=True):
    """Logprobs of prompt tokens `start`, `start + 1`, … given what precedes each of them."""

    request_index: int
    start: int
    logprobs: list[TokenLogprobs]


class StageTiming(Struct, frozen=True, array_like=True):
    """What one stage did from the end of the step before to the end of this one, in seconds.

    The parts follow each other in this order and without a gap: waiting for the plan, making the
    batch of it, waiting for hidden states, computing (the last stage: drawing too), handing on.
    `started_at` is when the first part began, on the clock of the worker that measured it.
    """

    stage_index: int
    step_id: int
    started_at: float
    plan_wait_s: float
    prepare_s: float
    tensor_wait_s: float
    compute_s: float
    send_s: float

    @property
    def busy_s(self) -> float:
        """What the step takes of a stage that never waits."""
        return self.prepare_s + self.compute_s + self.send_s

    @property
    def planned_at(self) -> float:
        """When the plan was in the worker's hands."""
        return self.started_at + self.plan_wait_s

    @property
    def received_at(self) -> float:
        """When the hidden states were there."""
        return self.planned_at + self.prepare_s + self.tensor_wait_s

    @property
    def ended_at(self) -> float:
        """When the next step's first part began."""
        return self.received_at + self.compute_s + self.send_s


class StepResult(Struct, frozen=True, array_like=True, tag=True):
    """What the last stage sends back: the tokens that it drew, in the order of the plan's
    `drawing_indexes`.

    `logprobs` are told by request index, where they were asked for. `timing` is the last stage's
    own; a stage before it reports on another message.
    """

    step_id: int
    token_ids: list[int]
    logprobs: dict[int, TokenLogprobs] = {}
    prompt_logprobs: list[PromptLogprobs] = []
    timing: StageTiming | None = None
