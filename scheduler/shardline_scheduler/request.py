"""One request and where it stands. Plain state: only the scheduler and its memory change it."""

from dataclasses import dataclass, field
from enum import Enum, StrEnum

from .budget import BudgetPrediction, LatencyBudget
from .plan import PromptLogprobs, SamplingParams, TokenLogprobs
from .terms import Terms

NEVER = float("-inf")
UNLIMITED = LatencyBudget()


class FinishReason(StrEnum):
    """Why a stream ended; exactly one of these closes every stream."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    DEADLINE = "deadline"
    ERROR = "error"


class RequestState(Enum):
    """WAITING -> RUNNING -> FINISHED, and back to WAITING by a preemption."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """Prompt, emitted tokens and progress of one request.

    `token_ids` holds prompt and emitted tokens for the life of the request, so that a replay is
    nothing but computing them again. `num_computed_tokens` counts what has been planned, which is
    ahead of what the workers have done, and ends at `num_computable_tokens` at the latest: nothing
    follows the last token that it may emit. `request_index` is its current name among the workers,
    who have been told the first `num_sent_blocks` blocks. `num_tokens_in_flight` tokens are being
    drawn, each in a step of its own, the last of them in `drawing_step_id`. `tenant` is whom its
    work is charged to. Times are the scheduler's, in seconds; -inf where there is none yet.
    """

    request_id: str
    token_ids: list[int]
    sampling: SamplingParams
    budget: LatencyBudget = UNLIMITED
    tenant: str = ""

    terms: Terms = field(init=False, default_factory=Terms)
    prediction: BudgetPrediction = field(init=False, default=BudgetPrediction())
    first_token_time: float = field(init=False, default=NEVER)
    last_token_time: float = field(init=False, default=NEVER)
    num_prompt_tokens: int = field(init=False)
    num_computable_tokens: int = field(init=False)
    arrival_time: float = field(init=False, default=0.0)
    sequence: int = field(init=False, default=-1)
    state: RequestState = field(init=False, default=RequestState.WAITING)
    num_preemptions: int = field(init=False, default=0)
    num_strikes: int = field(init=False, default=0)
    num_cached_tokens: int = field(init=False, default=0)
    num_delivered_prompt_logprobs: int = field(init=False, default=0)

    request_index: int = field(init=False, default=-1)
    num_computed_tokens: int = field(init=False, default=0)
    num_sent_blocks: int = field(init=False, default=0)
    last_step_id: int = field(init=False, default=-1)
    num_tokens_in_flight: int = field(init=False, default=0)
    drawing_step_id: int = field(init=False, default=-1)
    block_table: list[int] = field(init=False, default_factory=list)
    block_digests: list[bytes] = field(init=False, default_factory=list)
    num_registered_blocks: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        assert self.token_ids, "a prompt has at least one token"
        assert self.sampling.max_tokens >= 1, "max_tokens is at least 1"
        self.token_ids = list(self.token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.num_computable_tokens = self.num_prompt_tokens + self.sampling.max_tokens - 1

    @property
    def num_output_tokens(self) -> int:
        """Tokens emitted so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def is_token_in_flight(self) -> bool:
        """Whether a token is being drawn."""
        return self.num_tokens_in_flight > 0

    @property
    def needs_prompt_logits(self) -> bool:
        """Whether prompt positions must be computed even if their KV is cached.

        Prompt token 0 has no logprob, hence the 1.
        """
        return (
            self.sampling.num_prompt_logprobs is not None
            and self.num_delivered_prompt_logprobs < self.num_prompt_tokens - 1
        )

    def append(self, token_id: int, now: float) -> FinishReason | None:
        """Take in the drawn token; says why the request is finished, if it is."""
        self.num_tokens_in_flight -= 1
        self.last_token_time = now
        sampling, token_ids = self.sampling, self.token_ids
        index = len(token_ids) - self.num_prompt_tokens
        if not index:
            self.first_token_time = now
        token_ids.append(token_id)
        if token_id in sampling.stop_token_ids and index >= sampling.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if index + 1 >= sampling.max_tokens else None

    def accept_prompt_logprobs(self, piece: PromptLogprobs) -> list[TokenLogprobs]:
        """What of it is new: a replay computes some a second time."""
        num_known = self.num_delivered_prompt_logprobs + 1 - piece.start
        assert num_known >= 0, f"prompt logprobs of {self.request_id} begin at {piece.start}"
        accepted = piece.logprobs[num_known:]
        self.num_delivered_prompt_logprobs += len(accepted)
        return accepted

    def start(self, request_index: int, num_cached_tokens: int) -> None:
        """Begin, or begin again, with the KV of the first `num_cached_tokens` tokens at hand."""
        self.state = RequestState.RUNNING
        self.request_index = request_index
        self.num_computed_tokens = num_cached_tokens
        if self.num_preemptions == 0:
            self.num_cached_tokens = num_cached_tokens

    def restart(self) -> None:
        """Back to WAITING, keeping tokens; whatever is in flight for it will not count."""
        self.state = RequestState.WAITING
        self.num_preemptions += 1
        self.num_computed_tokens = 0
        self.num_tokens_in_flight = 0
