"""The service that both doors share: checked prompts and fields in, a stream of Pieces out."""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import msgspec

from shardline_scheduler.budget import BudgetOutcome, LatencyBudget
from shardline_server import errors
from shardline_server.budgets import BudgetPolicy, outcome_of, worst_outcome
from shardline_server.choice import Choice, Piece, joined
from shardline_server.door_config import DoorLimits
from shardline_server.engine_client import DeltaStream, EngineClient
from shardline_server.errors import (
    DeadlineMissed,
    InvalidRequest,
    NotServing,
    ShardlineError,
    TenantQuotaExceeded,
)
from shardline_server.messages import Delta, FinishReason, Refusal, Submit
from shardline_server.metrics import ChoiceTimer, Metrics
from shardline_server.prompts import Prompt
from shardline_server.request_fields import SamplingFields
from shardline_server.request_limits import check_size
from shardline_server.sampling import choice_seed, to_sampling_params
from shardline_server.served_model import ServedModel

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default for plain completions


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Tokens of a whole request: each prompt once, the output of every choice."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """Whose share a request counts for, and how long its call may take."""

    tenant: str = ""
    deadline_ms: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """On what terms the engine serves all choices of a request."""

    budget: LatencyBudget
    tenant: str


class Generation:
    """One client's request: `n` choices of each prompt, choice `p * n + i` being prompt p's i-th.

    Use it in a `with` block: leaving it aborts in the engine what is not finished.
    """

    def __init__(
        self,
        request_id: str,
        choices: Sequence[Choice],
        terms: Terms,
        service: "GenerationService",
    ) -> None:
        self.request_id = request_id
        self.choices = choices
        self._terms = terms
        self._outcomes: list[BudgetOutcome] = []
        self._service = service
        self._choice_of = {f"{request_id}-{choice.index}": choice for choice in choices}
        self._timers: dict[str, ChoiceTimer] = {}
        self._deltas: DeltaStream

    def __enter__(self) -> Self:
        terms = self._terms
        requests = [
            Submit(request_id, choice.prompt.token_ids, choice.params, terms.budget, terms.tenant)
            for request_id, choice in self._choice_of.items()
        ]
        self._deltas = self._service.engine.submit(requests)
        self._service.register(self)
        self._timers = {
            request_id: ChoiceTimer(self._service.metrics, len(choice.prompt.token_ids))
            for request_id, choice in self._choice_of.items()
        }
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._deltas.close(list(self._choice_of))
        self._service.unregister(self)
        for timer in self._timers.values():
            timer.observe_finish(FinishReason.ABORT)
        self._timers.clear()

    async def pieces(self) -> AsyncIterator[Piece]:
        """Pieces of all choices as they come, until each has finished.

        Raises what the engine refused or failed with; then no choice yields any more.
        """
        async for delta in self._deltas:
            self._raise_failure(delta)
            choice = self._choice_of[delta.request_id]
            num_before = choice.num_tokens
            piece = choice.advance(delta)
            self._timers[delta.request_id].observe_tokens(choice.num_tokens - num_before)
            if piece.finish_reason is not None:
                self._finish(delta, piece.finish_reason)
            yield piece

    async def collect(self) -> list[Piece]:
        """Wait for the end; one whole Piece for each choice. Raises like `pieces`."""
        parts: list[list[Piece]] = [[] for _ in self.choices]
        async for piece in self.pieces():
            parts[piece.choice].append(piece)
        return [joined(pieces) for pieces in parts]

    @property
    def usage(self) -> Usage:
        """As of now; complete when `pieces` has ended."""
        prompts = {id(choice.prompt): choice for choice in reversed(self.choices)}.values()
        return Usage(
            prompt_tokens=sum(len(choice.prompt.token_ids) for choice in prompts),
            completion_tokens=sum(choice.num_tokens for choice in self.choices),
            cached_tokens=sum(choice.num_cached_tokens for choice in prompts),
        )

    @property
    def tenant(self) -> str:
        """Whose request it is."""
        return self._terms.tenant

    @property
    def outcome(self) -> BudgetOutcome | None:
        """How its latency budget was kept; of several choices the worst. None until the end."""
        if len(self._outcomes) < len(self.choices):
            return None
        return worst_outcome(self._outcomes)

    def abort(self) -> None:
        """End every unfinished choice with finish reason "abort"; `pieces` goes on to the end."""
        self._deltas.abort()

    def _raise_failure(self, delta: Delta) -> None:
        if delta.finish_reason is FinishReason.ERROR:
            self._finish(delta, FinishReason.ERROR)
            raise error_of(delta)
        has_begun = delta.token_ids or any(choice.num_tokens for choice in self.choices)
        if delta.finish_reason is FinishReason.DEADLINE and not has_begun:
            self._finish(delta, FinishReason.DEADLINE)
            raise deadline_missed(self._terms.budget, delta.budget)

    def _finish(self, delta: Delta, reason: FinishReason) -> None:
        self._deltas.close([delta.request_id])
        timer = self._timers.pop(delta.request_id)
        timer.observe_finish(reason)
        self._outcomes.append(delta.budget or outcome_of(self._terms.budget, timer.times))


class GenerationService:
    """Starts Generations on one engine and knows those that run."""

    def __init__(
        self,
        engine: EngineClient,
        metrics: Metrics,
        *,
        default_max_tokens: int,
        budgets: BudgetPolicy,
        limits: DoorLimits,
    ) -> None:
        self.engine = engine
        self.metrics = metrics
        self.default_max_tokens = default_max_tokens
        self._budgets = budgets
        self._limits = limits
        self._model: ServedModel | None = None
        self._running: dict[str, Generation] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._refusal: str | None = None

    @property
    def model(self) -> ServedModel:
        """What is served; raises EngineUnavailable before it can be, and after the engine died."""
        self.engine.require_ready()
        if self._refusal is not None:
            raise NotServing(f"Cannot serve: {self._refusal}")
        if self._model is None:
            raise NotServing("The model is still loading; try again in a moment.")
        return self._model

    @property
    def num_running(self) -> int:
        """Requests of clients that have not ended."""
        return len(self._running)

    def attach(self, model: ServedModel) -> None:
        """From now on requests can be served."""
        self._model = model

    def refuse(self, reason: str) -> None:
        """From now on no new request is taken; those that run go on."""
        self._refusal = reason

    async def wait_idle(self, timeout_s: float) -> None:
        """Until no request runs, or the time is over."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)

    def generate(
        self,
        request_id: str,
        prompts: Sequence[Prompt],
        fields: SamplingFields,
        caller: Caller,
        *,
        default_max_tokens: int,
    ) -> Generation:
        """A Generation, not yet started. Raises InvalidRequest and its kin."""
        if request_id in self._running:
            raise InvalidRequest(f"request_id {request_id} is in use.", param="request_id")
        check_size(fields, len(prompts), self._limits)
        self._check_share(caller.tenant)
        num_choices = fields.n or 1
        choices: list[Choice] = []
        for prompt in prompts:
            params = to_sampling_params(
                fields,
                num_prompt_tokens=len(prompt.token_ids),
                limits=self.model.limits,
                default_max_tokens=default_max_tokens,
            )
            for i in range(num_choices):
                own = msgspec.structs.replace(params, seed=choice_seed(params.seed, i))
                choices.append(Choice(len(choices), prompt, own, fields, self.model.tokenizer))
        budget = self._budgets.budget_of(fields.latency_budget, call_deadline_ms=caller.deadline_ms)
        terms = Terms(budget=budget, tenant=caller.tenant)
        return Generation(request_id, choices, terms, self)

    def _check_share(self, tenant: str) -> None:
        limit = self._limits.max_tenant_requests
        if limit is None:
            return
        running = sum(generation.tenant == tenant for generation in self._running.values())
        if running >= limit:
            raise TenantQuotaExceeded(f"{running} requests of yours are under way already.")

    def abort(self, request_id: str) -> bool:
        """Abort a running request by its id; False if there is none."""
        generation = self._running.get(request_id)
        if generation is not None:
            generation.abort()
        return generation is not None

    def register(self, generation: Generation) -> None:
        """Called by a Generation that starts."""
        self._running[generation.request_id] = generation
        self._idle.clear()

    def unregister(self, generation: Generation) -> None:
        """Called by a Generation that ends."""
        del self._running[generation.request_id]
        if not self._running:
            self._idle.set()


def new_request_id(kind: str) -> str:
    """An id that cannot be guessed, such as `cmpl-1f…`."""
    return f"{kind}-{secrets.token_hex(16)}"


def error_of(delta: Delta) -> ShardlineError:
    """The exception that the engine named in a terminal record."""
    kind = getattr(errors, delta.error_code or "", errors.RequestFailed)
    known = isinstance(kind, type) and issubclass(kind, ShardlineError)
    message = delta.error_message or "The engine could not finish this request."
    return (kind if known else errors.RequestFailed)(message, refusal=delta.refusal)


def deadline_missed(budget: LatencyBudget, outcome: BudgetOutcome | None) -> DeadlineMissed:
    """The exception for a request that was ended for its budget before it had said anything."""
    predicted = None if outcome is None else outcome.predicted
    return DeadlineMissed(
        "The latency budget cannot be kept any more; the request was ended before its first token.",
        refusal=Refusal(asked=budget, predicted=predicted),
    )
