"""A scheduler with a reference worker behind it: holds every plan against the limits."""

from collections import Counter, deque
from dataclasses import dataclass, field

from shardline_scheduler import FinishReason, Request, RequestOutput, Scheduler, SchedulerConfig
from shardline_scheduler.plan import SamplingParams, StepPlan, TokenLogprobs

from .parts import parts_of
from .reference_worker import ReferenceWorker, prompt_logprob, solo


@dataclass
class Stream:
    """One request as its client sees it."""

    prompt: list[int]
    sampling: SamplingParams
    tokens: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    num_cached_tokens: int | None = None

    def take(self, output: RequestOutput) -> None:
        assert self.finish_reason is None, "nothing follows the end"
        assert output.index == len(self.tokens), "no token is lost or told twice"
        assert not (output.prompt_logprobs and self.tokens), "prompt logprobs come first"
        assert self.num_cached_tokens in (None, output.num_cached_tokens)
        self.num_cached_tokens = output.num_cached_tokens
        self.tokens += output.token_ids
        self.prompt_logprobs += output.prompt_logprobs
        self.finish_reason = output.finish_reason

    def assert_complete(self) -> None:
        assert self.tokens == solo(self.prompt, self.sampling)
        stopped = self.tokens[-1] in self.sampling.stop_token_ids
        stopped = stopped and len(self.tokens) > self.sampling.min_tokens
        assert self.finish_reason == (FinishReason.STOP if stopped else FinishReason.LENGTH)
        expected = []
        if self.sampling.num_prompt_logprobs is not None:
            expected = [prompt_logprob(self.prompt[:i]) for i in range(2, len(self.prompt) + 1)]
        assert self.prompt_logprobs == expected


class Pipe:
    """Plans go in at one end, results come out at the other, in order and as late as you like."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.config: SchedulerConfig = scheduler.config
        self.worker = ReferenceWorker(self.config.num_blocks, self.config.block_size)
        self.in_flight: deque[StepPlan] = deque()
        self.streams: dict[str, Stream] = {}
        self.running: dict[int, bool] = {}  # By index: whether all known tokens are planned.
        self.awaiting: Counter[int] = Counter()
        self.now = 0.0

    def add(self, request_id: str, prompt: list[int], **sampling: object) -> Stream:
        self.now += 1.0
        params = SamplingParams(**{"seed": 0, "max_tokens": 4} | sampling)  # type: ignore[arg-type]
        self.scheduler.add(Request(request_id, prompt, params), self.now)
        self.streams[request_id] = Stream(prompt, params)
        return self.streams[request_id]

    def abort(self, request_id: str) -> bool:
        self.streams.pop(request_id, None)
        return self.scheduler.abort(request_id)

    def plan(self) -> StepPlan | None:
        num_preemptions = self.scheduler.stats().num_preemptions
        plan = self.scheduler.plan(self.now)
        if plan is not None:
            self.in_flight.append(plan)
            num_preempted = self.scheduler.stats().num_preemptions - num_preemptions
            self._assert_limits(plan, num_preempted)
        return plan

    def commit(self) -> list[RequestOutput]:
        plan = self.in_flight.popleft()
        result = self.worker.execute(plan)
        self.awaiting -= Counter(plan.drawing_indexes)
        outputs = self.scheduler.commit(result, self.now)
        assert len({output.request_id for output in outputs}) == len(outputs)
        for output in outputs:
            self.streams[output.request_id].take(output)
        return outputs

    def lose_everything(self) -> None:
        """The workers die, with all KV and every plan that they were sent."""
        lost, self.worker = (
            self.worker,
            ReferenceWorker(self.config.num_blocks, self.config.block_size),
        )
        self.worker.next_step_id = lost.next_step_id + len(self.in_flight)
        num_unseen = sum(len(plan.new_requests) for plan in self.in_flight)
        self.worker.next_index = lost.next_index + num_unseen
        self.in_flight.clear()
        self.running.clear()
        self.awaiting.clear()
        self.scheduler.requeue_all(self.now)

    def drain(self) -> None:
        """Until everybody has finished, in far fewer rounds than the number of tokens squared."""
        num_tokens = sum(len(s.prompt) + s.sampling.max_tokens for s in self.streams.values())
        max_num_rounds = 10 + num_tokens**2
        while self.scheduler.has_work:
            max_num_rounds -= 1
            assert max_num_rounds > 0, "requests throw each other back for ever"
            if self.plan() is None:
                assert self.in_flight, "work, but nothing to plan and nothing to wait for"
                self.commit()
            self.scheduler.check()
        stats = self.scheduler.stats()
        assert (stats.num_running, stats.num_waiting, stats.num_used_kv_blocks) == (0, 0, 0)
        for stream in self.streams.values():
            stream.assert_complete()

    def _assert_limits(self, plan: StepPlan, num_preempted: int) -> None:
        parts, indexes = parts_of(plan), plan.request_indexes
        assert len(self.in_flight) <= self.config.in_flight_limit
        assert parts and len(set(indexes)) == len(parts)
        assert plan.num_tokens <= self.config.max_num_batched_tokens
        most = 1 if self.config.plans_ahead else 0
        assert all(self.awaiting[index] <= most for index in indexes), "its token is not back"
        for index in plan.released:
            del self.running[index]
            del self.awaiting[index]
        decodes = [index for index in indexes if self.running.get(index)]
        num_decodes = sum(self.running.values()) + num_preempted
        assert len(decodes) <= -(-num_decodes // self.config.num_shares)
        for part in parts:
            self.running[part.request_index] = part.samples
        assert len(self.running) <= self.config.max_num_seqs
        self.awaiting += Counter(plan.drawing_indexes)
