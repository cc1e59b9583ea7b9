"""Sends the requests: so many at a time, or as they arrive."""

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from shardline_client.async_client import AsyncClient
from shardline_client.bench.options import BenchOptions
from shardline_client.bench.prompts import Prompts
from shardline_client.bench.records import Outcome, Record
from shardline_client.errors import ClientError, Overloaded
from shardline_client.requests import Message, Prompt
from shardline_client.stream import AsyncStream

Observer = Callable[[Record], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRequest:
    """One request of the load; `arrival_s` counts from the run's start, in an open loop."""

    arrival_s: float
    prompt: Prompt
    num_output_tokens: int


def plan(options: BenchOptions, prompts: Prompts, rng: random.Random) -> Iterator[PlannedRequest]:
    """The requests in order, without end; the same for the same seed, whatever the server does."""
    arrival_s = 0.0
    while True:
        yield PlannedRequest(
            arrival_s=arrival_s,
            prompt=prompts.make(rng.randint(*options.prompt_tokens), rng),
            num_output_tokens=rng.randint(*options.output_tokens),
        )
        if options.rate is not None:
            arrival_s += rng.expovariate(options.rate)


class Load:
    """One run against one server."""

    def __init__(self, client: AsyncClient, options: BenchOptions, *, ignore_eos: bool) -> None:
        self._client = client
        self._options = options
        self._ignore_eos = ignore_eos
        self._start_s = 0.0

    async def warm_up(self, request: PlannedRequest) -> Record:
        """One request that is not counted."""
        self._start_s = time.perf_counter()
        return await self._send(request)

    async def run(self, requests: Iterator[PlannedRequest], observe: Observer) -> list[Record]:
        """All of them; `observe` sees each record as it is made."""
        records: list[Record] = []

        async def send(request: PlannedRequest) -> None:
            record = await self._send(request)
            records.append(record)
            observe(record)

        self._start_s = time.perf_counter()
        wanted = self._until_the_end(requests)
        async with asyncio.TaskGroup() as group:
            if self._options.rate is not None:
                for request in wanted:
                    await asyncio.sleep(request.arrival_s - self._now_s())
                    group.create_task(send(request))
            else:
                for _ in range(self._options.num_workers):
                    group.create_task(_one_after_another(wanted, send))
        return records

    def _until_the_end(self, requests: Iterator[PlannedRequest]) -> Iterator[PlannedRequest]:
        duration_s = self._options.duration_s
        for number, request in enumerate(requests):
            begins_s = max(request.arrival_s, self._now_s())
            if number == self._options.max_requests:
                return
            if duration_s is not None and begins_s >= duration_s:
                return
            yield request

    async def _send(self, request: PlannedRequest) -> Record:
        start_s = self._now_s()
        token_times_s: list[float] = []
        try:
            stream = self._stream(request)
            num_seen = 0
            async for piece in stream:
                if piece.token_ids or piece.text:
                    token_times_s.append(self._now_s())
                    num_seen += len(piece.token_ids) or 1
        except ClientError as error:
            kind = Outcome.REFUSED if isinstance(error, Overloaded) else Outcome.FAILED
            return Record(
                start_s=start_s,
                end_s=self._now_s(),
                outcome=kind,
                error=f"{type(error).__name__}: {error.message}",
            )
        usage = stream.usage
        return Record(
            start_s=start_s,
            end_s=self._now_s(),
            outcome=Outcome.OK,
            token_times_s=tuple(token_times_s),
            num_prompt_tokens=usage.prompt_tokens if usage else 0,
            num_cached_tokens=usage.cached_tokens if usage else 0,
            num_output_tokens=usage.completion_tokens if usage else num_seen,
        )

    def _stream(self, request: PlannedRequest) -> AsyncStream:
        options: dict[str, Any] = {
            "max_tokens": request.num_output_tokens,
            "temperature": self._options.temperature,
        }
        if self._ignore_eos:
            options["ignore_eos"] = True
        if self._options.is_chat:
            message = Message(role="user", content=str(request.prompt))
            return self._client.stream_chat([message], **options)
        return self._client.stream_complete(request.prompt, **options)

    def _now_s(self) -> float:
        return time.perf_counter() - self._start_s


async def _one_after_another(
    requests: Iterator[PlannedRequest], send: Callable[[PlannedRequest], Any]
) -> None:
    for request in requests:
        await send(request)
