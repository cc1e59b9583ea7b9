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
from dataclasses import dataclass
from itertools import count

from .config import SchedulerConfig
from .cost import StepCost, TokenBudget
from .errors import DuplicateRequest, QueueFull, RequestTooLong
from .memory import KvMemory
from .outcome import outcome_of
from .outputs import RequestOutput, SchedulerStats
from .plan import SampledToken, StepPlan, StepResult, TokenLogprobs
from .policy import POLICIES, Policy
from .queue import WaitingQueue
from .request import Request, RequestState
from .running import RunningRequests
from .step import Step
from .victims import Victims


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
        self._running = RunningRequests()
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
        step = Step(self._num_steps, self._cost, self._memory)
        self._plan_decodes(step, now)
        self._plan_prefills(step)
        self._plan_waiting(step)
        if not len(step):
            return None
        self._num_steps += 1
        self._in_flight.append(_InFlight(step.step_id, step.num_samples))
        # Released indexes wait for a plan with work in it: they cost an idle worker little, and
        # they are at most as many as were running.
        released, self._released = self._released, []
        return step.complete(released)

    def commit(self, result: StepResult, now: float) -> list[RequestOutput]:
        """Take in the result of the oldest plan in flight; returns the news."""
        self._set_time(now)
        expected = self._in_flight.popleft()
        assert result.step_id == expected.step_id, f"{result.step_id} instead of {expected}"
        assert len(result.tokens) == expected.num_samples, f"{len(result.tokens)} for {expected}"
        prompt_logprobs: dict[Request, list[TokenLogprobs]] = {}
        for piece in result.prompt_logprobs:
            request = self._running.get(piece.request_index)
            if request is not None and (accepted := request.accept_prompt_logprobs(piece)):
                prompt_logprobs[request] = accepted
        outputs = []
        for token in result.tokens:
            request = self._running.get(token.request_index)
            if request is not None:
                accepted = prompt_logprobs.pop(request, [])
                outputs.append(self._accept(request, token, accepted, now))
        for request, accepted in prompt_logprobs.items():
            outputs.append(RequestOutput.of(request, [], [], accepted, None))
        return outputs

    def requeue_all(self, now: float) -> None:
        """All KV is lost, and every plan in flight with it: everybody computes again what he has.

        Nothing of an earlier plan may be committed any more; step ids and indexes go on counting.
        """
        self._set_time(now)
        for request in list(self._running):
            self._release(request)
            request.restart()
            self._waiting.push(request)
        self._released.clear()
        self._in_flight.clear()
        self._memory.forget_prefixes()

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
        self._running.check()
        waiting = list(self._waiting)
        assert len(waiting) == len(self._waiting), "the waiting queue miscounts"
        for request in waiting:
            assert not (request.block_table or request.num_computed_tokens), "has begun, yet waits"
        alive = {request.request_id for request in (*waiting, *self._running)}
        assert alive == self._requests.keys(), f"orphans: {alive ^ self._requests.keys()}"
        assert self._in_flight or not any(request.is_token_in_flight for request in self._running)

    def _set_time(self, now: float) -> None:
        assert now >= self._now, f"time runs back from {self._now} to {now}"
        self._now = now

    def _plan_decodes(self, step: Step, now: float) -> None:
        """Give decodes their token, oldest first.

        Of R decodes at most ⌈R / in_flight_limit⌉, so that micro-batches stay even: requests that
        came together would else share one micro-batch for ever, and leave the stages before and
        after it idle.
        """
        cap = -(-self._running.num_decodes // self.config.in_flight_limit)
        victims = Victims(self._running, self._policy, step.step_id, now)
        passed_over: list[Request] = []
        while len(step) < cap and (request := self._running.pop_decode()):
            if self._memory.lacks_block(request) and not self._make_room(request, victims):
                passed_over.append(request)
            elif not step.schedule(request):
                passed_over.append(request)
                break
        self._running.put_back(passed_over)

    def _make_room(self, request: Request, victims: Victims) -> bool:
        """One more block; who gets none keeps what he has and waits for another step."""
        while not self._memory.pool.num_available:
            victim = victims.next_behind(request)
            if victim is None:
                return False
            self._preempt(victim)
        self._memory.grow(request)
        return True

    def _plan_prefills(self, step: Step) -> None:
        for request in self._running.prefills():
            if not self._schedule_prefill(step, request):
                break

    def _plan_waiting(self, step: Step) -> None:
        while self._waiting and len(self._running) < self.config.max_num_seqs:
            if not self._admit(step, self._waiting.peek()):
                break

    def _admit(self, step: Step, request: Request) -> bool:
        """Let the first of the queue run, if its tokens fit memory and one of them the step."""
        if not step.can_take(0):  # Spares the look-up; the prefix that it finds has a say too.
            return False
        prefix = self._memory.find_prefix(request)
        if not step.can_take(len(prefix) * self.config.block_size):
            return False
        # A block for each of the others, or their next tokens would throw the newcomer out again:
        # with memory short that made a quarter of all computing replay, and so it is a hundredth.
        if not self._memory.can_admit(request, prefix, num_spare_blocks=len(self._running)):
            return False
        self._waiting.pop()
        request.start(next(self._indexes), self._memory.admit(request, prefix))
        self._running.add(request)
        step.introduce(request)
        return self._schedule_prefill(step, request)

    def _schedule_prefill(self, step: Step, request: Request) -> bool:
        is_scheduled = step.schedule(request)
        if request.is_token_in_flight:
            self._running.end_prefill(request)
        return is_scheduled

    def _accept(
        self,
        request: Request,
        token: SampledToken,
        prompt_logprobs: list[TokenLogprobs],
        now: float,
    ) -> RequestOutput:
        token_ids, outcome = [token.token_id], None
        logprobs = [] if token.logprobs is None else [token.logprobs]
        finish_reason = request.append(token.token_id, now)
        if finish_reason is None:
            self._running.push_decode(request)
        else:
            self._remove(request)
            outcome = outcome_of(request, now, is_complete=True)
        return RequestOutput.of(
            request, token_ids, logprobs, prompt_logprobs, finish_reason, outcome
        )

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
        self._running.remove(request)
        self._released.append(request.request_index)
        self._memory.free(request)
