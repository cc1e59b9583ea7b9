"""The engine process: one loop that admits, plans, submits, commits and publishes.

Started as `python -m shardline_server.engine` with an `EngineConfig` as JSON on standard input; its
first and only line on standard output is an `EngineAddress`. It handles integers, never a tensor.
"""

import gc
import logging
import sys
import time
from collections.abc import Callable
from math import ceil
from pathlib import Path
from random import Random
from typing import NoReturn

import msgspec
import zmq

from shardline_scheduler import (
    BudgetImpossible,
    DuplicateRequest,
    Request,
    RequestOutput,
    Scheduler,
    SchedulerError,
)
from shardline_scheduler.plan import StageTiming, StepResult
from shardline_server.child import ChildExits
from shardline_server.deltas import delta_of, failure_of, refusal_of
from shardline_server.engine_config import EngineAddress, EngineConfig
from shardline_server.engine_signals import Leaving, StopSignal
from shardline_server.frontend_channel import FrontendChannel, RequestNames
from shardline_server.messages import (
    Abort,
    Delta,
    Drain,
    Drops,
    EngineAskedToLeave,
    EngineFailed,
    EngineReady,
    EngineRecovering,
    EngineStats,
    Hello,
    Output,
    Submit,
)
from shardline_server.pipe_accounting import PipeAccounting
from shardline_server.recovery import Recovery
from shardline_server.stage_watch import StageWatch
from shardline_server.step_costs import CostCache, StepCosts
from shardline_server.timing import TimingListener
from shardline_server.worker_group import WorkerFailed, WorkerGroup, WorkerLost
from shardline_shards.gate import Gate
from shardline_shards.messages import StageReport
from shardline_shards.process import start_child

logger = logging.getLogger("shardline.engine")

_LOOK_INTERVAL_S = 0.5
# What has just begun to serve needs the cores itself: even in idle time, importing takes a tenth to
# a fifth of two cores' tokens for ten seconds. So a spare worker is started when there is no work,
# or else a little later, since without one a worker that dies takes seconds more to come back.
_SPARE_AFTER_S = 3.0
_SPARE_DESPITE_WORK_AFTER_S = 10.0
# What front ends say is read in so small parts that the first answers to a burst do not wait for
# the last ones, nor the workers for all of them.
_MOST_READ_AT_ONCE = 8


class Engine:
    """The loop. State changes happen here and nowhere else."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self._gate = Gate(config.keys)
        self.frontends = FrontendChannel(self._gate, config.host, config.frontend_wire)
        self.workers = WorkerGroup(config, self._gate)
        self._recovery = Recovery(self.workers)
        self._exits = ChildExits()
        self._names = RequestNames()
        self._news: dict[bytes, list[Delta]] = {}
        self._has_news = False
        # What can wait until the workers have their next plan.
        self._outputs: list[RequestOutput] = []
        self._timings: list[StageTiming] = []
        self._is_idle_and_checked = False
        self._is_leaving = False
        self._has_asked_to_leave = False
        self._drops = Drops({})
        self.timing_listeners: list[TimingListener] = []
        self.is_serving = False

    def start(self) -> None:
        """Bring the workers up and tell the front ends. Raises WorkerFailed."""
        config = self.config
        num_blocks = self.workers.start()
        self.scheduler = Scheduler(config.scheduler_config(num_blocks), jitter=_jitter(config.seed))
        cache = CostCache(Path(config.cache_dir), self.workers.config)
        self.costs = StepCosts(
            self.scheduler, self.workers, cache, config.measure_s, vocab_size=config.vocab_size
        )
        self.costs.measure()
        self._second_look = self.costs.second_look(lambda: self.frontends.has_message)
        self.pipe, self._stage_watch = self._start_accounting(self.workers.config)
        self.timing_listeners += [self.pipe, self.costs]
        self._ready = EngineReady(
            min(config.max_model_len, self.scheduler.config.max_request_tokens),
            num_blocks,
            config.block_size,
            config.vocab_size,
        )
        logger.info("KV memory holds %d tokens", num_blocks * config.block_size)
        self._is_back()
        self.is_serving = True
        self._poller = zmq.Poller()
        for source in (*self.frontends.sources, *self.workers.sources):
            self._poller.register(source, zmq.POLLIN)
        self._poller.register(self._exits.fileno(), zmq.POLLIN)
        calm_garbage_collector()

    @staticmethod
    def _start_accounting(config: EngineConfig) -> tuple[PipeAccounting, StageWatch | None]:
        """Stages are held against what they were cut for, where that is known."""
        pp, times, cut = config.layout.pp, config.layer_times, config.layout.stage_layers
        if pp == 1 or times is None:
            return PipeAccounting(pp, time.monotonic()), None
        pipe = PipeAccounting(pp, time.monotonic(), times.stage_times(cut))
        return pipe, StageWatch(times, cut)

    def run(self) -> NoReturn:
        """Serve until an exception ends it: WorkerFailed, or Leaving."""
        next_look = 0.0
        while True:
            news = dict(self._poller.poll(self._patience_ms()))
            self.pipe.woke(now := time.monotonic())
            try:
                if self._exits.fileno() in news or now >= next_look:
                    self._look_around()
                    next_look = now + _LOOK_INTERVAL_S
                if self.frontends.has_unread or not news.keys().isdisjoint(self.frontends.sources):
                    self._read_inbox()
                if self.workers.has_unread or not news.keys().isdisjoint(self.workers.sources):
                    self._commit()
                self._outputs += self.scheduler.expire(time.monotonic())
                self._plan()
                self._publish()
                self._learn()
                self._look_again()
            except WorkerLost as loss:
                self._recover(loss)
                self._publish()

    def _look_again(self) -> None:
        """With nothing else to do: were step times really what made something impossible?"""
        if self._second_look is not None and self._second_look.is_due(time.monotonic()):
            self._second_look.go_on()

    def _patience_ms(self) -> int:
        """How long there is nothing to do unless somebody says something."""
        now = time.monotonic()
        if self.frontends.has_unread:
            return 0
        if self._second_look is not None and self._second_look.is_due(now):
            return 0
        until_expiry_s = self.scheduler.next_expiry - now
        return ceil(1000 * max(0.0, min(_LOOK_INTERVAL_S, until_expiry_s)))

    def fail(self, reason: str) -> None:
        """Tell every front end, also those whose greeting has not been read or has yet to come.

        The first is waited for: it is our parent, which still reads its tokenizer, and ends us if
        it gives up.
        """
        while not self.frontends.frontends:
            self.frontends.wait()
            self.frontends.receive()
        while self.frontends.receive() is not None:
            pass
        self.frontends.send_all(EngineFailed(reason))

    def close(self) -> None:
        """After the workers have left: say what is still to be said."""
        self.frontends.close()
        self._gate.close()

    def _look_around(self) -> None:
        """Now and then: are all workers alive, and is every block accounted for when idle?"""
        self._exits.clear()
        self.workers.check()
        self.workers.check_hang(self.scheduler.seconds_in_flight)
        now = time.monotonic()
        pipe_stats = self.pipe.stats(now)
        self.frontends.send_all(pipe_stats)
        self._tell_drops()
        if not self._has_asked_to_leave and (leaving := self.workers.find_leaving()):
            self._has_asked_to_leave = True
            self.frontends.send_all(EngineAskedToLeave(leaving))
        if self._stage_watch is not None:
            self._stage_watch.look(pipe_stats)
        if self.config.keeps_spare and now >= self._spare_due():
            self.workers.keep_spare()
        if not self.scheduler.has_work and not self._is_idle_and_checked:
            self.scheduler.check()
            self._is_idle_and_checked = True

    def _tell_drops(self) -> None:
        channels = {"frontend": self.frontends.num_dropped, **self.workers.num_dropped()}
        if channels != self._drops.by_channel:
            self._drops = Drops(channels)
            self.frontends.send_all(self._drops)

    def _recover(self, loss: WorkerLost) -> None:
        """Bring the workers back, and let everybody compute again what he has."""
        self._tell()
        self.frontends.send_all(EngineRecovering(str(loss)))
        steps_s = self.scheduler.seconds_in_flight
        guilty = self.scheduler.strike(loss.request_indexes)
        self.scheduler.requeue_all(time.monotonic())
        self.pipe.lost()
        for request in guilty:
            message = f"The step of this request was the last of two workers; the second: {loss}"
            self._end(request, "RequestFailed", message)
        self._recovery.run(loss, steps_s)
        self._is_back()

    def _is_back(self) -> None:
        self.frontends.send_all(self._ready)
        self._back_at = time.monotonic()

    def _spare_due(self) -> float:
        has_work = self.scheduler.has_work
        return self._back_at + (_SPARE_DESPITE_WORK_AFTER_S if has_work else _SPARE_AFTER_S)

    def _read_inbox(self) -> None:
        now = time.monotonic()  # of all: who comes together is told the same
        for _ in range(_MOST_READ_AT_ONCE):
            if (received := self.frontends.receive()) is None:
                return
            frontend, message = received
            match message:
                case Hello():
                    self.frontends.send(frontend, self._ready)
                    self.frontends.send(frontend, self._drops)
                case Submit():
                    self._is_idle_and_checked = False
                    self._admit(frontend, message, now)
                case Abort():
                    self._abort(frontend, message.request_id)
                case Drain():
                    self._drain(message.grace_s)

    def _drain(self, grace_s: float) -> None:
        """Take nothing more; who would not be done in time is told so at once."""
        self._is_leaving = True
        now = time.monotonic()
        for request in self.scheduler.late_at(now + grace_s, now):
            message = f"The server is shutting down, and this would take longer than {grace_s:g} s."
            self._end(request, "NotServing", message)

    def _end(self, request: Request, code: str, message: str) -> None:
        """End a request that is alive, with an error."""
        frontend, request_id = self._names[request.request_id]
        delta = failure_of(request_id, code, message, index=request.num_output_tokens)
        self._news.setdefault(frontend, []).append(delta)
        self._abort(frontend, request_id)

    def _admit(self, frontend: bytes, submit: Submit, now: float) -> None:
        if self._is_leaving:
            refusal = failure_of(submit.request_id, "NotServing", "The server is shutting down.")
            self._news.setdefault(frontend, []).append(refusal)
            self._has_news = True
            return
        name = self._names.add(frontend, submit.request_id)
        self._has_news = True
        try:
            request = Request(name, submit.token_ids, submit.sampling, submit.budget, submit.tenant)
            self.scheduler.add(request, now)
        except SchedulerError as error:
            if not isinstance(error, DuplicateRequest):
                self._names.forget(name)
            if isinstance(error, BudgetImpossible) and self._second_look is not None:
                self._second_look.want()
            self._news.setdefault(frontend, []).append(refusal_of(submit.request_id, error))

    def _abort(self, frontend: bytes, request_id: str) -> None:
        name = self._names.scheduler_id(frontend, request_id)
        self.scheduler.abort(name)
        self._names.forget(name)
        self._has_news = True

    def _commit(self) -> None:
        for message in self.workers.results():
            if isinstance(message, StageReport):
                self._hear(message.timings, message.sent_at)
            else:
                self._commit_result(message)

    def _commit_result(self, result: StepResult) -> None:
        if result.timing is not None:
            self._hear([result.timing], result.timing.ended_at)
        self._has_news = True
        self._outputs += self.scheduler.commit(result, time.monotonic())

    def _hear(self, timings: list[StageTiming], sent_at: float) -> None:
        self.pipe.heard(timings[0].stage_index, sent_at, time.monotonic())
        self._timings += timings

    def _learn(self) -> None:
        for timing in self._timings:
            for listener in self.timing_listeners:
                listener.observe(timing)
        self._timings.clear()

    def _tell(self) -> None:
        for output in self._outputs:
            self._has_news = True
            frontend, request_id = self._names[output.request_id]
            self._news.setdefault(frontend, []).append(delta_of(request_id, output))
            if output.finish_reason is not None:
                self._names.forget(output.request_id)
        self._outputs.clear()

    def _plan(self) -> None:
        while (plan := self.scheduler.plan(time.monotonic())) is not None:
            self.workers.submit(plan)
            self.pipe.submitted(plan.step_id, time.monotonic())
            self._has_news = True
        self.pipe.settled(self.scheduler.has_work, time.monotonic())

    def _publish(self) -> None:
        self._tell()
        if not self._has_news:
            return
        stats = msgspec.convert(self.scheduler.stats(), EngineStats, from_attributes=True)
        for frontend in self.frontends.frontends:
            self.frontends.send(frontend, Output(self._news.get(frontend, []), stats))
        self._news.clear()
        self._has_news = False


def main() -> None:
    """Entry point of the process."""
    config = msgspec.json.decode(sys.stdin.buffer.readline(), type=EngineConfig)
    start_child("engine", config.parent_pid)
    logging.basicConfig(
        level=config.log_level.upper(),
        format="%(asctime)s %(levelname)s [engine] %(message)s",
        stream=sys.stderr,
    )
    sys.exit(_serve(Engine(config)))


def calm_garbage_collector() -> None:
    """Thousands of live requests make full collections slow: measured, 6.1 µs a request and step
    became 1.6 with these thresholds. What exists by now stays anyway.
    """
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def _jitter(seed: int) -> Callable[[], float]:
    """Who is sent away together comes back spread over a fifth of the time."""
    rng = Random(seed)
    return lambda: rng.uniform(0.0, 0.2)


def _serve(engine: Engine) -> int:
    """Run to the end; returns the exit status: 2 for what the operator can mend."""
    stop_signal = StopSignal(engine.workers.hurry)
    try:
        address = EngineAddress(engine.frontends.address)
        print(msgspec.json.encode(address).decode(), flush=True)
        engine.start()
        engine.run()
    except Leaving:
        _leave(engine)
        return 0
    except WorkerFailed as failure:
        stop_signal.spend()
        logger.error("%s", failure)
        engine.fail(str(failure))
        engine.workers.kill()
        return 2 if failure.is_refusal else 1
    finally:
        engine.close()


def _leave(engine: Engine) -> None:
    """What was learnt is kept first: whoever hurries us may lose patience."""
    if engine.is_serving:
        engine.costs.save()
        engine.workers.stop()
    else:
        engine.workers.kill()  # still loading: nobody reads a Stop


if __name__ == "__main__":
    main()
