"""A server under load whose parts are killed and stopped at random: `make chaos`.

Every offered request must have exactly one outcome, every completed one must say what it says
alone, and in the end nothing may be left: no block, no request, no process, no descriptor.
"""

import argparse
import asyncio
import contextlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
from tests.server.conftest import build_tokenizer
from tests.tiny import save_tiny

from shardline_client import AsyncClient, ClientError, Retry

NUM_STREAMS = 16
BURST = 64
PROMPTS = ("The", "The quick brown", "Pack my box with five", "These stops")
NUM_SEEDS = 3
OPTIONS = {"max_tokens": 60, "ignore_eos": True}
MAX_DEATHS_A_MINUTE = 2  # of one worker; a third ends the server, as it should
Request = tuple[str, int]


@dataclass
class Server:
    """`shardline serve` in two stages, with both doors."""

    process: subprocess.Popen[str]
    http: str
    grpc: str

    def parts(self) -> list[psutil.Process]:
        """Engine, workers and spare, as far as they can be seen now."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def workers(self) -> dict[str, psutil.Process]:
        found = {}
        for part in self.parts():
            with contextlib.suppress(psutil.NoSuchProcess):
                name = " ".join(part.cmdline())
                if "worker stage" in name:
                    found[name] = part
        return found

    def num_descriptors(self) -> int:
        """Of the front end and the engine, which outlive everything that happens here."""
        processes = [psutil.Process(self.process.pid), *self.parts()]
        names = [" ".join(process.cmdline()) for process in processes]
        return sum(
            process.num_fds()
            for process, name in zip(processes, names, strict=True)
            if "worker" not in name
        )


@contextlib.asynccontextmanager
async def serving(model: Path) -> AsyncIterator[Server]:
    command = [sys.executable, "-m", "shardline_server", "serve", str(model), "--pp", "2"]
    command += ["--dtype", "float32", "--port", "0", "--grpc-port", "0", "--num-kv-blocks", "512"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    banner = ""
    while "gRPC" not in banner:
        banner += await asyncio.to_thread(process.stdout.readline)
    http, grpc = re.findall(r"(?:HTTP|gRPC)  (?:http://)?([\d.:]+)", banner)
    server = Server(process, f"http://{http}", f"grpc://{grpc}")
    try:
        yield server
        parts = server.parts()
        process.terminate()
        assert await asyncio.to_thread(process.wait, 30) == 0, "it left with an error"
        _, alive = psutil.wait_procs(parts, timeout=10)
        assert not alive, f"left behind: {alive}"
    finally:
        process.kill()
        process.communicate()


@dataclass
class Chaos:
    """Load, trouble, and the count of what came of it."""

    server: Server
    clients: list[AsyncClient]
    random: random.Random
    expected: dict[Request, str] = field(default_factory=dict)
    num_offered: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    troubles: Counter[str] = field(default_factory=Counter)
    deaths: defaultdict[str, deque[float]] = field(
        default_factory=lambda: defaultdict(lambda: deque(maxlen=MAX_DEATHS_A_MINUTE))
    )

    async def learn(self) -> None:
        """What each request says alone."""
        for prompt in PROMPTS:
            for seed in range(NUM_SEEDS):
                answer = await self.clients[0].complete(prompt, seed=seed, **OPTIONS)
                self.expected[prompt, seed] = answer.text

    async def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        trouble = asyncio.create_task(self._trouble(end))
        streams = [asyncio.create_task(self._stream(end)) for _ in range(NUM_STREAMS)]
        await asyncio.gather(trouble, *streams)

    async def _stream(self, end: float) -> None:
        while time.monotonic() < end:
            await self._ask()

    async def _ask(self) -> None:
        self.num_offered += 1
        request = self.random.choice(list(self.expected))
        manner = self.random.choices(("reads", "reads slowly", "vanishes"), (8, 1, 1))[0]
        try:
            outcome = await self._read(request, manner)
        except ClientError as error:
            outcome = type(error).__name__
        self.outcomes[outcome] += 1

    async def _read(self, request: Request, manner: str) -> str:
        prompt, seed = request
        client = self.random.choice(self.clients)
        async with client.stream_complete(prompt, seed=seed, **OPTIONS) as stream:
            async for _ in stream:
                if manner == "vanishes":
                    return "vanished"
                if manner == "reads slowly":
                    await asyncio.sleep(0.02)
            assert stream.completion.finish_reason == "length"
            assert stream.completion.text == self.expected[request], f"{request} says otherwise"
        return "completed"

    async def _trouble(self, end: float) -> None:
        kinds = (self._kill, self._kill, self._stop, self._burst, self._hang_up)
        while time.monotonic() < end:
            await asyncio.sleep(self.random.uniform(1, 6))
            kind = self.random.choice(kinds)
            await kind()

    async def _kill(self) -> None:
        if (worker := self._victim()) is not None:
            worker.kill()
            self.troubles["killed"] += 1

    async def _stop(self) -> None:
        if (worker := self._victim()) is not None:
            worker.suspend()
            self.troubles["stopped"] += 1

    async def _burst(self) -> None:
        self.troubles["bursts"] += 1
        await asyncio.gather(*(self._ask() for _ in range(BURST)))

    async def _hang_up(self) -> None:
        self.server.process.send_signal(signal.SIGHUP)
        self.troubles["hang-ups"] += 1

    def _victim(self) -> psutil.Process | None:
        workers = self.server.workers()
        if not workers:
            return None
        name = self.random.choice(sorted(workers))
        deaths, now = self.deaths[name], time.monotonic()
        if len(deaths) == MAX_DEATHS_A_MINUTE and now - deaths[0] < 61:
            return None
        deaths.append(now)
        return workers[name]


async def settled(server: Server) -> None:
    """Until it is ready, and nothing runs or holds a block."""
    async with httpx.AsyncClient(base_url=server.http, timeout=60) as probe:
        while (await probe.get("/ready")).status_code != 200:
            await asyncio.sleep(0.2)
        gauges = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        while True:
            lines = (await probe.get("/metrics")).text.splitlines()
            own = [
                line for line in lines if line.startswith(tuple(f"shardline:{g}" for g in gauges))
            ]
            if len(own) == len(gauges) and all(line.endswith(" 0.0") for line in own):
                return
            await asyncio.sleep(0.2)


async def run(model: Path, seconds: float, seed: int) -> Chaos:
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(serving(model))
        options = {"timeout_s": 120.0, "retry": Retry(max_attempts=1)}
        clients = [
            await stack.enter_async_context(AsyncClient(url, **options))
            for url in (server.http, server.grpc)
        ]
        chaos = Chaos(server, clients, random.Random(seed))
        await chaos.learn()
        await asyncio.gather(*(chaos._ask() for _ in range(BURST)))  # opens what will stay open
        await settled(server)
        num_descriptors = server.num_descriptors()
        await chaos.run(seconds)
        await settled(server)
        assert chaos.outcomes.total() == chaos.num_offered
        assert chaos.outcomes["completed"], "nothing was completed"
        surplus = server.num_descriptors() - num_descriptors
        assert surplus <= 4 * NUM_STREAMS, f"{surplus} more descriptors than before"
        assert len(server.workers()) == 2
    return chaos


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = save_tiny("llama", Path(folder), vocab_size=400)
        build_tokenizer().save_pretrained(model)
        chaos = asyncio.run(run(model, arguments.seconds, arguments.seed))
    print(f"offered {chaos.num_offered}: {dict(chaos.outcomes)}; trouble: {dict(chaos.troubles)}")


if __name__ == "__main__":
    main()
