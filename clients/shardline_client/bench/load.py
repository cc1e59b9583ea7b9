"""Sends the requests: so many at a time, or as they arrive."""

import asyncio
import random
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from shardline_client.async_client import AsyncClient
from shardline_client.bench.arrivals import Trace, drawn_arrivals
from shardline_client.bench.classes import RequestClass
from shardline_client.bench.options import BenchOptions
from shardline_client.bench.prompts import Prompts
from shardline_client.bench.records import Outcome, Record
from shardline_client.errors import BudgetImpossible, ClientError, DeadlineMissed, Overloaded
from shardline_client.requests import Message, Prompt
from shardline_client.stream import AsyncStream

Observer = Callable[[Record], None]

GOOD_ENDS = ("stop", "length", None)  # None: some servers do not tell


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRequest:
    """One request of the load; `arrival_s` counts from the run's start, in an open loop."""

    arrival_s: float
    prompt: Prompt
    num_output_tokens: int
    wanted: RequestClass


@dataclass(frozen=True, kw_only=True, slots=True)
class Sent:
    """What a run sent; arrivals went on until `span_s`, and `cpu_s` is what sending took here."""

    records: list[Record]
    span_s: float
    wall_s: float
    cpu_s: float


def plan(
    options: BenchOptions,
    prompts: Prompts,
    seed: object,
    *,
    rate: float | None = None,
    trace: Trace | None = None,
) -> Iterator[PlannedRequest]:
    """The requests in order, without end but that of a trace.

    Arrivals, lengths and classes are the same for the same seed, whatever prompts a server takes;
    another rate stretches the arrivals, and has other prompts, which no cache has seen.
    """
    words, draw = random.Random(f"prompts {seed} {rate}"), random.Random(f"shapes {seed}")
    shares = [one.share for one in options.classes]
    for arrival_s, num_prompt, num_output in _shapes(options, seed, rate, trace):
        wanted = draw.choices(options.classes, shares)[0]
        prompt_range = wanted.prompt_tokens or num_prompt or options.prompt_tokens
        output_range = wanted.output_tokens or num_output or options.output_tokens
        yield PlannedRequest(
            arrival_s=arrival_s,
            prompt=prompts.make(draw.randint(*prompt_range), words),
            num_output_tokens=draw.randint(*output_range),
            wanted=wanted,
        )


Range = tuple[int, int]


def _shapes(
    options: BenchOptions, seed: object, rate: float | None, trace: Trace | None
) -> Iterator[tuple[float, Range | None, Range | None]]:
    """Arrival and, of a trace, lengths."""
    if trace is None:
        gaps = random.Random(f"gaps {seed}")
        arrivals = drawn_arrivals(rate, options.cv, gaps) if rate else _at_once()
        yield from ((arrival_s, None, None) for arrival_s in arrivals)
        return
    if options.num_requests is not None:
        trace = trace.first(options.num_requests + 1)
    time_scale = trace.rate / rate if rate else options.time_scale or 1.0
    for one in trace.scaled(time=time_scale, length=options.length_scale).requests:
        lengths = one.num_prompt_tokens, one.num_output_tokens
        yield one.arrival_s, (lengths[0],) * 2, (lengths[1],) * 2


def _at_once() -> Iterator[float]:
    while True:
        yield 0.0


class Load:
    """One run against one server."""

    def __init__(self, client: AsyncClient, options: BenchOptions) -> None:
        self._client = client
        self._options = options
        self._start_s = 0.0
        self._span_s = 0.0

    async def warm_up(self, request: PlannedRequest) -> Record:
        """One request that is not counted, and has no budget to keep."""
        self._start_s = time.perf_counter()
        return await self._send(request, 0.0, has_budget=False)

    async def run(self, requests: Iterator[PlannedRequest], observe: Observer) -> Sent:
        """All of them; `observe` sees each record as it is made."""
        records: list[Record] = []

        async def send(request: PlannedRequest) -> None:
            start_s = request.arrival_s if self._options.is_open_loop else self._now_s()
            record = await self._send(request, start_s, has_budget=bool(self._options.send_budget))
            records.append(record)
            observe(record)

        cpu_s, self._start_s = time.process_time(), time.perf_counter()
        wanted = self._until_the_end(requests)
        async with asyncio.TaskGroup() as group:
            if self._options.is_open_loop:
                for request in wanted:
                    await asyncio.sleep(request.arrival_s - self._now_s())
                    group.create_task(send(request))
            else:
                for _ in range(self._options.num_workers):
                    group.create_task(_one_after_another(wanted, send))
        return Sent(
            records=records,
            span_s=self._span_s,
            wall_s=self._now_s(),
            cpu_s=time.process_time() - cpu_s,
        )

    def _until_the_end(self, requests: Iterator[PlannedRequest]) -> Iterator[PlannedRequest]:
        """Notes when arrivals ended: at the first one too many, so that no gap is lost."""
        options, number = self._options, 0
        for number, request in enumerate(requests):
            begins_s = request.arrival_s if options.is_open_loop else self._now_s()
            self._span_s = begins_s
            if number == options.max_requests:
                return
            if options.duration_s is not None and begins_s >= options.duration_s:
                self._span_s = options.duration_s
                return
            yield request
        self._span_s += self._span_s / max(1, number)  # a trace's end: one more mean gap

    async def _send(self, request: PlannedRequest, start_s: float, *, has_budget: bool) -> Record:
        sent_s = self._now_s()
        times_s, counts = array("d"), array("H")
        finish_reason = None
        try:
            stream = self._stream(request, has_budget=has_budget)
            async for piece in stream:
                finish_reason = piece.finish_reason or finish_reason
                if piece.token_ids or piece.text:
                    times_s.append(self._now_s())
                    counts.append(len(piece.token_ids) or 1)
        except ClientError as error:
            return self._unserved(request, start_s, sent_s, error)
        usage, told = stream.usage, stream.latency_budget
        is_good = finish_reason in GOOD_ENDS
        return Record(
            start_s=start_s,
            sent_s=sent_s,
            end_s=self._now_s(),
            outcome=_outcome_of_end(finish_reason),
            class_name=request.wanted.name,
            token_times_s=times_s,
            token_counts=counts,
            num_prompt_tokens=usage.prompt_tokens if usage else 0,
            num_cached_tokens=usage.cached_tokens if usage else 0,
            num_output_tokens=usage.completion_tokens if usage else sum(counts),
            error=None if is_good else f"The answer ended with {finish_reason!r}.",
            is_told_met=told.met if told and has_budget else None,
            predicted_ttft_ms=told.predicted_ttft_ms if told else None,
            told_ttft_ms=told.ttft_ms if told else None,
        )

    def _unserved(
        self, request: PlannedRequest, start_s: float, sent_s: float, error: ClientError
    ) -> Record:
        return Record(
            start_s=start_s,
            sent_s=sent_s,
            end_s=self._now_s(),
            outcome=_outcome_of_error(error),
            class_name=request.wanted.name,
            error=f"{type(error).__name__}: {error.message}",
            retry_after_s=error.retry_after_s,
        )

    def _stream(self, request: PlannedRequest, *, has_budget: bool) -> AsyncStream:
        options: dict[str, Any] = {
            "max_tokens": request.num_output_tokens,
            "temperature": self._options.temperature,
        }
        if self._options.ignore_eos:
            options["ignore_eos"] = True
        if has_budget:
            options["latency_budget"] = request.wanted.budget
        if self._options.is_chat:
            message = Message(role="user", content=str(request.prompt))
            return self._client.stream_chat([message], **options)
        return self._client.stream_complete(request.prompt, **options)

    def _now_s(self) -> float:
        return time.perf_counter() - self._start_s


def _outcome_of_end(finish_reason: str | None) -> Outcome:
    if finish_reason == "deadline":
        return Outcome.EXPIRED
    return Outcome.OK if finish_reason in GOOD_ENDS else Outcome.FAILED


def _outcome_of_error(error: ClientError) -> Outcome:
    if isinstance(error, Overloaded | BudgetImpossible):
        return Outcome.REFUSED
    return Outcome.EXPIRED if isinstance(error, DeadlineMissed) else Outcome.FAILED


async def _one_after_another(
    requests: Iterator[PlannedRequest], send: Callable[[PlannedRequest], Any]
) -> None:
    for request in requests:
        await send(request)
