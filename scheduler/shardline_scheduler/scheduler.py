"""The scheduler: requests come in, plans go out, results come back.

Catch-up scheduling: a step gives a request min(tokens it still has to compute, what the step can
afford). A chunk of a prompt, what a prefix hit leaves over, a decode and the replay after a
preemption are the same line.

Several plans may be in flight. `num_computed_tokens` moves when a plan is made, so chunks of one
request may follow each other at once; a decode waits for its token. Workers execute plans strictly
in order, and results are committed in that order.

A request_index is current from the plan that introduces it until its request finishes, is
preempted or is aborted, and is never used again. A token or logprob that comes back for an index
that is not current any more is dropped. Nothing is lost by it: a preempted request has its earlier
tokens, was never told the dropped one, and draws it again, with the same seed and token index.
"""

from collections import deque
from dataclasses import dataclass, field
from itertools import count

from .config import SchedulerConfig
from .cost import StepCost, StepLoad, TokenBudget
from .errors import DuplicateRequest, QueueFull, RequestTooLong
from .memory import KvMemory
from .outputs import RequestOutput, SchedulerStats
from .plan import NewRequest, SampledToken, ScheduledRequest, StepPlan, StepResult, TokenLogprobs
from .policy import POLICIES, Key, Policy
from .queue import WaitingQueue
from .request import FinishReason, Request, RequestState


@dataclass(slots=True)
class _Step:
    """A plan in the making."""

    step_id: int
    now: float
    load: StepLoad = field(default_factory=StepLoad)
    new_requests: list[NewRequest] = field(default_factory=list)
    scheduled: list[ScheduledRequest] = field(default_factory=list)
    filled: list[Request] = field(default_factory=list)
    victims: list[Request] | None = None
    is_short_of_memory: bool = False


@dataclass(slots=True, frozen=True)
class _InFlight:
    """What is remembered of a plan until its result comes."""

    step_id: int
    num_samples: int


class Scheduler:
    """Decides what every step computes. Time is an argument, in seconds, and never runs back."""

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        policy: Policy | None = None,
        cost: StepCost | None = None,
    ) -> None:
        self.config = config
        self._policy = policy or POLICIES[config.policy]()
        self._cost = cost or TokenBudget(config.max_num_batched_tokens)
        self._memory = KvMemory(config.num_blocks, config.block_size, config.enable_prefix_cache)
        self._requests: dict[str, Request] = {}
        self._waiting = WaitingQueue(self._policy)
        # Running requests by request_index. Of these, in order of admission, those that have more
        # to compute than a decode; and, oldest token first, the indexes of decodes whose token is
        # back (with some that are not current any more, to be skipped). The others are in flight.
        self._running: dict[int, Request] = {}
        self._prefills: dict[int, Request] = {}
        self._decodes: deque[int] = deque()
        self._released: list[int] = []
        self._in_flight: deque[_InFlight] = deque()
        self._sequences = count()
        self._indexes = count()
        self._num_steps = 0
        self._num_preemptions = 0
        self._now = float("-inf")

    @property
    def has_requests(self) -> bool:
        """Whether any request is alive."""
        return bool(self._requests)

    @property
    def has_work(self) -> bool:
        """Whether there is anything to plan or to commit."""
        return bool(self._requests or self._in_flight)

    @property
    def num_in_flight(self) -> int:
        """Plans whose results are not committed yet."""
        return len(self._in_flight)

    def add(self, request: Request, now: float) -> None:
        """Take a request in; raises DuplicateRequest, RequestTooLong or QueueFull if it cannot."""
        self._set_time(now)
        if request.request_id in self._requests:
            raise DuplicateRequest(request.request_id)
        num_prompt_tokens, max_tokens = request.num_prompt_tokens, request.sampling.max_tokens
        if num_prompt_tokens + max_tokens > self.config.max_request_tokens:
            limit = self.config.max_request_tokens
            raise RequestTooLong(num_prompt_tokens, max_tokens, limit)
        if len(self._waiting) >= self.config.max_num_waiting:
            raise QueueFull(len(self._waiting), self.config.max_num_waiting)
        request.arrival_time = now
        request.sequence = next(self._sequences)
        self._requests[request.request_id] = request
        self._waiting.push(request)

    def abort(self, request_id: str) -> bool:
        """Forget a request and free its blocks at once; False if it is not alive. No output."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        self._remove(request)
        return True

    def plan(self, now: float) -> StepPlan | None:
        """The next step, to be executed after all earlier ones.

        None while `in_flight_limit` plans are in flight, or while nothing can be computed before
        a result is committed or a request is added.
        """
        self._set_time(now)
        if len(self._in_flight) >= self.config.in_flight_limit:
            return None
        step = _Step(self._num_steps, now)
        self._plan_decodes(step)
        self._plan_prefills(step)
        self._plan_waiting(step)
        return self._submit(step) if step.scheduled else None

    def commit(self, result: StepResult, now: float) -> list[RequestOutput]:
        """Take in the result of the oldest plan in flight; returns the news."""
        self._set_time(now)
        expected = self._in_flight.popleft()
        assert result.step_id == expected.step_id, f"{result.step_id} instead of {expected}"
        assert len(result.tokens) == expected.num_samples, f"{len(result.tokens)} for {expected}"
        prompt_logprobs = self._accept_prompt_logprobs(result)
        outputs = [
            self._accept_token(self._running[token.request_index], token, prompt_logprobs)
            for token in result.tokens
            if token.request_index in self._running
        ]
        for index, logprobs in prompt_logprobs.items():
            outputs.append(_output(self._running[index], [], [], logprobs, None))
        return outputs

    def stats(self) -> SchedulerStats:
        """Gauges and totals, as of now."""
        memory, pool = self._memory, self._memory.pool
        return SchedulerStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_kv_blocks=pool.num_blocks,
            num_used_kv_blocks=pool.num_used,
            num_cached_kv_blocks=pool.num_cached,
            num_preemptions=self._num_preemptions,
            num_prefix_queries=memory.num_prefix_queries,
            num_prefix_hits=memory.num_prefix_hits,
            num_steps=self._num_steps,
            num_in_flight=len(self._in_flight),
        )

    def check(self) -> None:
        """Assert that no block leaks and no request is orphaned; linear in blocks and requests."""
        self._memory.check(self._requests.values())
        waiting = list(self._waiting)
        assert len(waiting) == len(self._waiting), "the waiting queue miscounts"
        decoding = [i for i in self._decodes if i in self._running]
        in_flight = [i for i, request in self._running.items() if request.is_token_in_flight]
        assert sorted([*self._prefills, *decoding, *in_flight]) == sorted(self._running), (
            f"prefills {[*self._prefills]}, decodes {decoding} and in flight {in_flight} "
            f"are not the running {[*self._running]}"
        )
        assert self._in_flight or not in_flight, f"nobody will bring the tokens of {in_flight}"
        alive = {request.request_id for request in (*waiting, *self._running.values())}
        assert alive == self._requests.keys(), f"orphans: {alive ^ self._requests.keys()}"
        assert not any(request.block_table for request in waiting), "a waiting request has blocks"

    def _set_time(self, now: float) -> None:
        assert now >= self._now, f"time runs back from {self._now} to {now}"
        self._now = now

    def _plan_decodes(self, step: _Step) -> None:
        """Of the R decodes, ⌈R / plans in flight⌉ at most, so that micro-batches stay even.

        Those that came together may leave apart; with all in one micro-batch, the other stages
        would idle for ever.
        """
        num_decodes = len(self._running) - len(self._prefills)
        cap = -(-num_decodes // self.config.in_flight_limit)
        blocked: list[int] = []
        while self._decodes and len(step.scheduled) < cap:
            request = self._running.get(self._decodes[0])
            if request is None:
                self._decodes.popleft()
            elif self._memory.lacks_block(request) and not self._make_room(step, request):
                blocked.append(self._decodes.popleft())
            elif self._schedule(step, request):
                self._decodes.popleft()
            else:
                break
        self._decodes.extendleft(reversed(blocked))

    def _plan_prefills(self, step: _Step) -> None:
        for request in list(self._prefills.values()):
            if not self._schedule(step, request):
                break

    def _plan_waiting(self, step: _Step) -> None:
        while (
            not step.is_short_of_memory
            and self._waiting
            and len(self._running) < self.config.max_num_seqs
            and self._admit(step, self._waiting.peek())
        ):
            pass

    def _admit(self, step: _Step, request: Request) -> bool:
        """Let the first of the queue run, if its tokens fit memory and one of them the step."""
        if self._cost.affordable_tokens(step.load, 0) < 1:
            return False
        prefix = self._memory.find_prefix(request)
        context = len(prefix) * self.config.block_size
        if self._cost.affordable_tokens(step.load, context) < 1:
            return False
        if not self._memory.can_admit(request, prefix, len(self._running)):
            return False
        self._waiting.pop()
        request.start(next(self._indexes), self._memory.admit(request, prefix))
        self._running[request.request_index] = request
        self._prefills[request.request_index] = request
        step.new_requests.append(_introduce(request))
        return self._schedule(step, request)

    def _schedule(self, step: _Step, request: Request) -> bool:
        """Put as much of the request as the step can afford into it; False if that is nothing."""
        context = request.num_computed_tokens
        num_known = len(request.token_ids)
        num_tokens = min(num_known - context, self._cost.affordable_tokens(step.load, context))
        if num_tokens < 1:
            return False
        step.load.add(num_tokens, context)
        samples = context + num_tokens == num_known
        step.scheduled.append(
            ScheduledRequest(
                request.request_index,
                context,
                num_tokens,
                request.token_ids[request.num_sent_tokens :],
                request.block_table[request.num_sent_blocks :],
                samples,
            )
        )
        request.num_sent_tokens = num_known
        request.num_sent_blocks = len(request.block_table)
        request.num_computed_tokens = context + num_tokens
        request.last_step_id = step.step_id
        if samples:
            request.is_token_in_flight = True
            self._prefills.pop(request.request_index, None)
        if self._memory.has_full_block(request):
            step.filled.append(request)
        return True

    def _submit(self, step: _Step) -> StepPlan:
        for request in step.filled:
            self._memory.register(request)
        num_samples = sum(scheduled.samples for scheduled in step.scheduled)
        self._in_flight.append(_InFlight(step.step_id, num_samples))
        self._num_steps += 1
        # Released indexes wait for a plan with work in it: they cost an idle worker little, and
        # they are at most as many as were running.
        released, self._released = self._released, []
        return StepPlan(step.step_id, released, step.new_requests, step.scheduled)

    def _make_room(self, step: _Step, request: Request) -> bool:
        """One more block for a running request, if need be at the cost of those behind it.

        Only who comes later in the policy's order is preempted, and nobody who is in this step
        already. So the first in order always gets on, and without ever being thrown back; when
        it has finished, the next one is first. Whoever can preempt nobody keeps its blocks and
        waits.
        """
        while not self._memory.pool.num_available:
            step.is_short_of_memory = True
            victim = self._next_victim(step)
            if victim is None or self._order(victim, step) <= self._order(request, step):
                return False
            self._preempt(victim)
        self._memory.grow(request)
        return True

    def _next_victim(self, step: _Step) -> Request | None:
        """The last in order of the running requests that are not in this step."""
        if step.victims is None:  # Sorted once, and only by a step that needs it.
            step.victims = sorted(self._running.values(), key=lambda r: self._order(r, step))
        while step.victims:
            victim = step.victims[-1]
            if victim.request_index in self._running and victim.last_step_id != step.step_id:
                return victim
            step.victims.pop()
        return None

    def _order(self, request: Request, step: _Step) -> tuple[Key, int]:
        return self._policy.preemption_key(request, step.now), request.sequence

    def _preempt(self, request: Request) -> None:
        self._release(request)
        request.restart()
        self._waiting.push(request)
        self._num_preemptions += 1

    def _remove(self, request: Request) -> None:
        was_waiting = request.state is RequestState.WAITING
        request.state = RequestState.FINISHED
        del self._requests[request.request_id]
        if was_waiting:
            self._waiting.drop(request)
        else:
            self._release(request)

    def _release(self, request: Request) -> None:
        """Take a running request off the workers and out of memory."""
        del self._running[request.request_index]
        self._prefills.pop(request.request_index, None)
        self._released.append(request.request_index)
        self._memory.free(request)

    def _accept_token(
        self,
        request: Request,
        token: SampledToken,
        prompt_logprobs: dict[int, list[TokenLogprobs]],
    ) -> RequestOutput:
        request.is_token_in_flight = False
        finish_reason = request.append(token.token_id)
        if finish_reason is None:
            self._decodes.append(token.request_index)
        else:
            self._remove(request)
        logprobs = [] if token.logprobs is None else [token.logprobs]
        of_prompt = prompt_logprobs.pop(token.request_index, [])
        return _output(request, [token.token_id], logprobs, of_prompt, finish_reason)

    def _accept_prompt_logprobs(self, result: StepResult) -> dict[int, list[TokenLogprobs]]:
        """What is new of them, by request_index; a replay computes some a second time."""
        accepted: dict[int, list[TokenLogprobs]] = {}
        for piece in result.prompt_logprobs:
            request = self._running.get(piece.request_index)
            if request is None:
                continue
            num_known = request.num_delivered_prompt_logprobs + 1 - piece.start
            assert num_known >= 0, f"prompt logprobs of {request.request_id} have a gap"
            if num_known < len(piece.logprobs):
                accepted[piece.request_index] = piece.logprobs[num_known:]
                request.num_delivered_prompt_logprobs += len(piece.logprobs) - num_known
        return accepted


def _introduce(request: Request) -> NewRequest:
    return NewRequest(
        request.request_index,
        list(request.token_ids),
        request.num_prompt_tokens,
        request.sampling,
    )


def _output(
    request: Request,
    token_ids: list[int],
    logprobs: list[TokenLogprobs],
    prompt_logprobs: list[TokenLogprobs],
    finish_reason: FinishReason | None,
) -> RequestOutput:
    return RequestOutput(
        request_id=request.request_id,
        index=request.num_output_tokens - len(token_ids),
        token_ids=token_ids,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        finish_reason=finish_reason,
        num_cached_tokens=request.num_cached_tokens,
    )
