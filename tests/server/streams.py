"""Streams over both doors while something happens to the server, and all that each of them says."""

import contextlib
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from shardline_client import Client

NUM_STREAMS = 32
LONGEST_S = 120
_RNG = random.Random(6)
_COMMON = [_RNG.randrange(3, 400) for _ in range(40)]


@dataclass(frozen=True)
class Said:
    """What a client was told in all; how much of a prompt was cached is not the same every time."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    stop_reason: str | int | None
    num_prompt_tokens: int
    num_completion_tokens: int


def make_requests() -> list[tuple[list[int], dict[str, Any]]]:
    """Prompts and options: half of them greedy, half sampled; some share a beginning; half may
    end by a token before they are as long as they may be, but not soon.
    """
    rng = random.Random(7)
    requests = []
    for number in range(NUM_STREAMS):
        prompt = [rng.randrange(3, 400) for _ in range(rng.randint(1, 60))]
        options: dict[str, Any] = {"temperature": number // 2 % 2, "seed": number}
        options |= {"max_tokens": rng.randint(200, 350), "min_tokens": 150}
        if number % 8 < 4:
            options["ignore_eos"] = True
        else:
            options["stop_token_ids"] = rng.sample(range(3, 400), 8)
        requests.append((_COMMON + prompt if number % 3 == 0 else prompt, options))
    return requests


def read_streams(doors: Sequence[str], disturb: Callable[[], None]) -> list[Said]:
    """What each request is told, each over the next door in turn; `disturb` is called once all of
    them have begun, and before any has ended.
    """
    begun = threading.Barrier(NUM_STREAMS + 1, timeout=LONGEST_S)

    def read(client: Client, prompt: list[int], options: dict[str, Any]) -> Said:
        try:
            with client.stream_complete(prompt, **options) as stream:
                next(pieces := iter(stream))
                begun.wait()
                for _ in pieces:
                    pass
        except Exception:
            begun.abort()  # Whoever has begun would else wait for one that never does.
            raise
        [choice], usage = stream.completion.choices, stream.completion.usage
        assert usage is not None
        return Said(
            choice.text,
            choice.token_ids,
            choice.finish_reason,
            choice.stop_reason,
            usage.prompt_tokens,
            usage.completion_tokens,
        )

    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(door, timeout_s=LONGEST_S)) for door in doors]
        threads = stack.enter_context(ThreadPoolExecutor(NUM_STREAMS))
        streams = [
            threads.submit(read, clients[number % len(clients)], *request)
            for number, request in enumerate(make_requests())
        ]
        try:
            begun.wait()
        except threading.BrokenBarrierError:
            raise ExceptionGroup("streams have not begun", _failures(streams)) from None
        disturb()
        assert not any(stream.done() for stream in streams), "it came too late for some"
        return [stream.result() for stream in streams]


def _failures(streams: Sequence[Future[Said]]) -> list[Exception]:
    """Of all that have ended by an error; most of them only since others had not begun."""
    wait(streams)
    failures = [error for one in streams if isinstance(error := one.exception(), Exception)]
    return sorted(failures, key=lambda error: isinstance(error, threading.BrokenBarrierError))
