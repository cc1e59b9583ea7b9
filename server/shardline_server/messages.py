"""What front ends and the engine say to each other, as msgpack over ZMQ. Integers only, no text.

A front end is a ZMQ DEALER, the engine a ROUTER; every message is one frame. A front end says
`Hello` once, then sends `Submit` and `Abort`; the engine answers with `EngineReady` as soon as it
can serve, then sends `Output`, and `EngineFailed` once if it has to end. There may be many front
ends, each with its own identity.
"""

from collections.abc import Sequence

from msgspec import Struct

from shardline_scheduler.accuracy import Accuracy
from shardline_scheduler.budget import BudgetOutcome, BudgetPrediction, LatencyBudget
from shardline_scheduler.outcome import ClassStats
from shardline_scheduler.plan import SamplingParams, TokenLogprobs
from shardline_scheduler.request import FinishReason as FinishReason


class Hello(Struct, frozen=True, tag=True):
    """A front end is there; answered with `EngineReady`, at once or when the model is loaded."""


class Submit(Struct, frozen=True, tag=True):
    """A new request: prompt token ids and how to sample. `request_id` is unique per front end.

    `tenant` is who shares are counted for: the name of the API key, or what a header says.
    """

    request_id: str
    token_ids: list[int]
    sampling: SamplingParams
    budget: LatencyBudget = LatencyBudget()
    tenant: str = ""


class Abort(Struct, frozen=True, tag=True):
    """The client does not want this request any more; no Delta follows for it."""

    request_id: str


class Drain(Struct, frozen=True, tag=True):
    """The server leaves in `grace_s`: take nothing more, and end at once what will not be done."""

    grace_s: float


class Refusal(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a refused client needs beside the message: when to come back, and what was asked for."""

    retry_after_s: float | None = None
    asked: LatencyBudget | None = None
    predicted: BudgetPrediction | None = None


class Delta(Struct, frozen=True, array_like=True):
    """A streamed piece of one request: `token_ids` are its output tokens `index`, `index + 1`, …

    `logprobs` has one entry a token, or is empty. `prompt_logprobs` comes in pieces, in order,
    before the first token; prompt token 0 has none, so the first entry belongs to prompt token 1.
    The terminal record has a `finish_reason`; with "error" (or a refusal) also `error_code` (the
    name of an exception class of `errors`) and `error_message`. `num_cached_tokens` counts the
    prompt tokens that came from the prefix cache; every Delta carries it. `refusal` says more about
    an error that the client can wait out, `budget` on a terminal record how the request went.
    """

    request_id: str
    index: int
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprobs]
    prompt_logprobs: Sequence[TokenLogprobs]
    finish_reason: FinishReason | None
    error_code: str | None
    error_message: str | None
    num_cached_tokens: int
    refusal: Refusal | None = None
    budget: BudgetOutcome | None = None


class EngineStats(Struct, frozen=True, array_like=True):
    """Gauges and running totals, as of one step; of budgets by class, and of predictions."""

    num_running: int
    num_waiting: int
    num_kv_blocks: int
    num_used_kv_blocks: int
    num_cached_kv_blocks: int
    num_preemptions: int
    num_prefix_queries: int
    num_prefix_hits: int
    num_steps: int
    num_in_flight: int
    classes: list[ClassStats]
    accuracy: Accuracy


class Output(Struct, frozen=True, tag=True):
    """All Deltas of one step for this front end, and the engine's gauges."""

    deltas: list[Delta]
    stats: EngineStats


class StageStats(Struct, frozen=True):
    """What a stage's time has gone to since the start, and how long a step took of it lately.

    `seconds` has an entry for each `TimePart`; they sum to the wall. `step_s` leaves waiting out.
    `predicted_s` is this stage's part, as predicted when layers were dealt out, of what all stages
    together took; None where nothing was predicted.
    """

    seconds: dict[str, float]
    step_s: float
    predicted_s: float | None = None


class PipeStats(Struct, frozen=True, tag=True):
    """Where the pipe's time goes, told twice a second; see `pipe_accounting` for the imbalances."""

    wall_s: float
    num_steps: int
    batch_imbalance: float
    stage_imbalance: float
    stages: list[StageStats]


class EngineReady(Struct, frozen=True, tag=True):
    """The split model is loaded and can serve."""

    max_model_len: int
    num_kv_blocks: int
    block_size: int
    vocab_size: int


class EngineRecovering(Struct, frozen=True, tag=True):
    """Workers were lost; requests that run go on after a pause, which `EngineReady` ends."""

    reason: str


class EngineAskedToLeave(Struct, frozen=True, tag=True):
    """Another node was told to leave, so that the server has to; requests may finish before."""

    reason: str


class EngineFailed(Struct, frozen=True, tag=True):
    """The engine ends; `reason` names the rank and says why."""

    reason: str


class Drops(Struct, frozen=True, tag=True):
    """What was dropped since the engine's start, by channel: what could not be read, strangers."""

    by_channel: dict[str, int]


ToEngine = Hello | Submit | Abort | Drain
FromEngine = (
    Output | PipeStats | EngineReady | EngineRecovering | EngineAskedToLeave | EngineFailed | Drops
)
