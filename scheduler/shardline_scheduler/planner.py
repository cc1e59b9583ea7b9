"""Fills a step: decodes first, then prompts, as far as seats, memory and its time allow."""

from bisect import bisect_left
from itertools import accumulate
from math import inf

from .config import SchedulerConfig
from .cost import StepLoad
from .cost_model import PipeModel
from .keeper import Keeper
from .policy import Key, Policy
from .request import Request, RequestState
from .seating import Seating
from .step import Step
from .target import Prompts
from .verdict import Ahead
from .victims import Victims

_RUNNING = RequestState.RUNNING


class Planner:
    """Plans by a policy and the budgets that a keeper keeps; who runs and waits is in `seating`."""

    def __init__(
        self,
        config: SchedulerConfig,
        policy: Policy,
        keeper: Keeper,
        model: PipeModel,
        seating: Seating,
    ) -> None:
        self.config = config
        self._policy = policy
        self._keeper = keeper
        self._model = model
        self._seating = seating
        self._memory, self._waiting = seating.memory, seating.waiting
        self._running = seating.running

    def fill(self, step_id: int, now: float, ahead: Ahead) -> Step:
        """The step, perhaps with nothing in it."""
        if (request := self._keeper.promise_starving(now, ahead)) is not None:
            self._seating.begin_promise(request)
        step = Step(step_id, self._keeper.cost, self._memory)
        victims = Victims(self._running, self._policy, step_id, now)
        self._plan_decodes(step, victims, now)
        self._plan_prompts(step, victims, now)
        return step

    def _plan_decodes(self, step: Step, victims: Victims, now: float) -> None:
        """Give decodes their token, oldest first; those of guests if they leave time for the rest.

        Of R decodes at most ⌈R / num_shares⌉, so that micro-batches stay even: requests that came
        together would else share one micro-batch for ever, and leave the stages before and after
        it idle.
        """
        num_shares, running = self.config.num_shares, self._running
        self._take_decodes(step, victims, -(-running.num_promised_decodes // num_shares), inf)
        self._make_way(victims)
        cap = -(-running.num_decodes // num_shares)
        if len(step) < cap:
            has_promised = running.num_promised_decodes > 0
            limit_s = self._keeper.guest_limit_s(step.load, now, has_promised)
            self._take_decodes(step, victims, cap, limit_s, guest=True)

    def _take_decodes(
        self, step: Step, victims: Victims, cap: int, limit_s: float, *, guest: bool = False
    ) -> None:
        """Until the step has `cap` of them or takes `limit_s`. Thousands of times a second in a
        busy server, so it goes by lists, and asks for time once.
        """
        passed_over: list[Request] = []
        taken: list[Request] = []
        while len(step) < cap and (decodes := self._running.pop_decodes(cap - len(step), guest)):
            num_ready = self._count_ready(decodes, step.step_id)
            num_timely = self._count_within(limit_s, step.load, decodes[:num_ready])
            able = decodes[:num_timely]
            if self._memory.pool.num_available < len(able):
                able = [r for r in able if self._can_go_on(r, step, victims, passed_over)]
            step.take_decodes(able)
            taken += able
            if num_timely < len(decodes):
                passed_over += decodes[num_timely:]
                break
        self._running.put_back(passed_over, guest=guest)
        self._running.follow(taken)

    def _count_ready(self, decodes: list[Request], step_id: int) -> int:
        """How many of them, from the first on, read no token that may still be on its way when the
        first stage is free for this step: it would wait for it there, and newcomers behind it.
        """
        num_stages = self.config.num_stages
        if not self.config.plans_ahead or num_stages == 1:
            return len(decodes)
        for count, decode in enumerate(decodes):
            if decode.num_tokens_in_flight and decode.drawing_step_id > step_id - num_stages:
                return count
        return len(decodes)

    def _count_within(self, limit_s: float, load: StepLoad, decodes: list[Request]) -> int:
        """How many of them, from the first on, may join a step until it takes `limit_s`."""
        if limit_s == inf:
            return len(decodes)
        contexts = [0, *accumulate(request.num_computed_tokens for request in decodes)]

        def is_late(count: int) -> bool:
            joined = load.copy()
            joined.num_decodes += count
            joined.decode_context += contexts[count]
            return self._model.step_seconds(joined) > limit_s

        if not is_late(len(decodes)):
            return len(decodes)
        return max(0, bisect_left(range(len(decodes)), True, key=is_late) - 1)

    def _can_go_on(
        self, decode: Request, step: Step, victims: Victims, passed_over: list[Request]
    ) -> bool:
        if decode.state is not _RUNNING:
            return False  # It has just made room for another one.
        if self._memory.lacks_block(decode) and not self._make_room(decode, victims):
            passed_over.append(decode)
            return False
        decode.last_step_id = step.step_id  # It makes room for nobody any more.
        return True

    def _make_room(self, request: Request, victims: Victims) -> bool:
        """One more block; who gets none keeps what he has and waits for another step."""
        while not self._memory.pool.num_available:
            victim = victims.next_behind(request)
            if victim is None:
                return False
            self._preempt(victim)
        self._memory.grow(request)
        return True

    def _plan_prompts(self, step: Step, victims: Victims, now: float) -> None:
        """Prompts in the policy's order, those that run and those that wait alike."""
        prefills = sorted(self._running.prefills(), key=self._order, reverse=True)
        self._aim(step, prefills, now)
        is_open = True
        while prefills or (is_open and self._waiting):
            head = self._waiting.peek() if is_open and self._waiting else None
            if head is not None and (not prefills or self._order(head) < self._order(prefills[-1])):
                is_open = self._admit(step, head, victims)
                continue
            request = prefills.pop()
            if request.state is not RequestState.RUNNING or request.last_step_id == step.step_id:
                continue  # It has just made room for another one.
            if not self._schedule_prefill(step, request):
                break

    def _aim(self, step: Step, prefills: list[Request], now: float) -> None:
        num_tokens = self._waiting.num_tokens
        num_tokens += sum(len(r.token_ids) - r.num_computed_tokens for r in prefills)
        count, running = len(prefills) + len(self._waiting), self._running
        prompts = Prompts(
            count,
            num_tokens,
            num_joining=min(count, self.config.max_num_seqs - running.num_decodes),
            num_decodes=running.num_decodes,
            has_promised_decodes=running.num_promised_decodes > 0,
        )
        self._keeper.aim(step.load, now, prompts)

    def _order(self, request: Request) -> tuple[Key, int]:
        return self._policy.key(request), request.sequence

    def _admit(self, step: Step, request: Request, victims: Victims) -> bool:
        """Let the first of the queue run, if there is a seat, its tokens fit memory and one of
        them the step.
        """
        if not step.may_hold(request):
            return False
        if not step.can_take(0):  # Spares the look-up; the prefix that it finds has a say too.
            return False
        prefix = self._memory.find_prefix(request)
        if not step.can_take(len(prefix) * self.config.block_size):
            return False
        if not self._has_place(request, prefix):
            return False
        self._seating.seat_first(prefix)
        self._keeper.start(request)
        step.introduce(request)
        return self._schedule_prefill(step, request)

    def _make_way(self, victims: Victims) -> None:
        """Let guests step back for the first of the queue, if that is promised to be in time;
        before they get a part of the step.
        """
        if not self._waiting or not (request := self._waiting.peek()).terms.is_promised:
            return
        while not self._has_place(request, self._memory.find_prefix(request)):
            victim = victims.next_guest()
            if victim is None:
                break
            self._preempt(victim)

    def _has_place(self, request: Request, prefix: list[int]) -> bool:
        """A seat, and the blocks: one for each of the others too, or their next tokens would throw
        the newcomer out again. With memory short that made a quarter of all computing replay, and
        so it is a hundredth.
        """
        num_running = len(self._running)
        return num_running < self.config.max_num_seqs and self._memory.can_admit(
            request, prefix, num_spare_blocks=num_running
        )

    def _schedule_prefill(self, step: Step, request: Request) -> bool:
        is_scheduled = step.may_hold(request) and step.schedule(request)
        if is_scheduled:
            self._keeper.progress(request)
        if request.is_token_in_flight:
            self._running.end_prefill(request)
        return is_scheduled

    def _preempt(self, request: Request) -> None:
        self._seating.preempt(request)
        self._keeper.restart(request)
