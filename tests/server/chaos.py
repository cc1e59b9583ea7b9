"""A server under load whose parts are killed and stopped at random: `make chaos`.

As root it has two hosts, and the wire between them is cut, pulled, slowed and loses packets. Every
offered request must have exactly one outcome, every completed one must say what it says alone, and
in the end nothing may be left: no block, no request, no process, no descriptor, no memory.
"""

import argparse
import asyncio
import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
from tests.server.conftest import build_tokenizer
from tests.server.namespaces import DOOR_ADDRESS, HEAD_ADDRESS, LOSSY, SLOW, Hosts, Wire, two_hosts
from tests.tiny import save_tiny

from shardline_client import AsyncClient, ClientError, Retry

NUM_STREAMS = 16
BURST = 64
PROMPTS = ("The", "The quick brown", "Pack my box with five", "These stops")
NUM_SEEDS = 3
OPTIONS = {"max_tokens": 60, "ignore_eos": True}
MAX_DEATHS_A_MINUTE = 2  # of one worker; a third ends the server, as it should
MINUTE_S = 75.0  # the server counts from when it holds one dead, which takes a while for a hang
LONGEST_CUT_S = 2.0  # a node counts as gone after 4 s, and is heard again up to 1.1 s after a cut
MAX_GROWTH = 0.1  # of memory; heaps keep what bursts have needed once
WORKER = "shardline: worker"
RENDEZVOUS_PORT = 29800
Request = tuple[str, int]


@dataclass(frozen=True)
class Footprint:
    """What a server takes while it is idle."""

    processes: list[str]
    num_descriptors: int
    memory_mb: float


@dataclass
class Server:
    """`shardline serve` in stages, with both doors; perhaps with another node beside it."""

    processes: list[subprocess.Popen[str]]
    http: str
    grpc: str
    hosts: Hosts | None

    def parts(self) -> dict[psutil.Process, str]:
        """Everything but workers' own threads, by name, as far as it can be seen now."""
        found = {}
        for process in self.processes:
            root = psutil.Process(process.pid)
            for part in (root, *root.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    found[part] = " ".join(part.cmdline()).strip()
        return found

    def workers(self, of: subprocess.Popen[str] | None = None) -> dict[str, psutil.Process]:
        ours = None if of is None else psutil.Process(of.pid).children(recursive=True)
        return {
            name: part
            for part, name in self.parts().items()
            if name.startswith(f"{WORKER} stage") and (ours is None or part in ours)
        }

    def lasting(self) -> list[psutil.Process]:
        """Front end, engine and the other node's agent outlive everything that happens here."""
        return [part for part, name in self.parts().items() if not name.startswith(WORKER)]

    async def footprint(self) -> Footprint:
        """Once all workers and the spare processes are there, and nobody else; a worker that has
        just been killed may still be to be replaced.
        """
        async with asyncio.timeout(120):
            while not self._is_complete(list(self.parts().values())):
                await asyncio.sleep(0.2)
        lasting = self.lasting()
        return Footprint(
            sorted(self.parts().values()),
            sum(process.num_fds() for process in lasting),
            sum(process.memory_info().rss for process in lasting) / 1e6,
        )

    def _is_complete(self, names: list[str]) -> bool:
        num_nodes = len(self.processes)
        num_workers = sum(name.startswith(f"{WORKER} stage") for name in names)
        return (num_workers, names.count(WORKER)) == (num_nodes + 1, num_nodes)


def _command(hosts: Hosts | None, model: Path) -> list[list[str]]:
    """What is started, the head first."""
    ours = [sys.executable, "-m", "shardline_server"]
    serve = [*ours, "serve", str(model), "--dtype", "float32", "--num-kv-blocks", "512"]
    serve += ["--port", "0", "--grpc-port", "0"]
    if hosts is None:
        return [[*serve, "--pp", "2"]]
    rendezvous = f"{HEAD_ADDRESS}:{RENDEZVOUS_PORT}"
    nodes = ["--nodes", "2", "--iface", "wire0", "--rendezvous", rendezvous, "--pp", "3"]
    head = [*serve, *nodes, "--node-gpus", "1,2", "--host", DOOR_ADDRESS]
    worker = [*ours, "worker", "--join", rendezvous, "--iface", "wire1"]
    return [hosts.on(hosts.head, *head), hosts.on(hosts.node, *worker)]


@contextlib.asynccontextmanager
async def serving(model: Path, hosts: Hosts | None) -> AsyncIterator[Server]:
    environment = os.environ | {"SHARDLINE_SECRET": "a secret of the tests"}
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        for command in _command(hosts, model)
    ]
    try:
        head = processes[0]
        assert head.stdout is not None
        banner = ""
        while "gRPC  " not in banner:
            assert head.poll() is None, "it did not start"
            banner += await asyncio.to_thread(head.stdout.readline)
        http, grpc = re.findall(r"(?:HTTP|gRPC)  (?:http://)?([\d.:]+)", banner)
        server = Server(processes, f"http://{http}", f"grpc://{grpc}", hosts)
        yield server
        parts = list(server.parts())
        head.terminate()
        for process in processes:
            assert await asyncio.to_thread(process.wait, 30) == 0, "it left with an error"
        _, alive = psutil.wait_procs(parts, timeout=10)
        assert not alive, f"left behind: {alive}"
    finally:
        for process in processes:
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

    footprints: tuple[Footprint, ...] = ()

    def check(self) -> None:
        """Connections that clients keep open are descriptors that came meanwhile."""
        assert self.outcomes.total() == self.num_offered
        assert self.outcomes["completed"], "nothing was completed"
        before, after = self.footprints
        assert after.processes == before.processes
        surplus = after.num_descriptors - before.num_descriptors
        assert surplus <= 4 * NUM_STREAMS, f"{surplus} more descriptors than before"
        growth = after.memory_mb / before.memory_mb - 1
        assert growth <= MAX_GROWTH, f"{growth:.1%} more memory than before"

    def __str__(self) -> str:
        before, after = self.footprints
        return (
            f"offered {self.num_offered}: {dict(self.outcomes)}; trouble: {dict(self.troubles)}; "
            f"of what outlives it all: {before.memory_mb:.0f} MB before, {after.memory_mb:.0f} MB "
            f"after, {before.num_descriptors} and {after.num_descriptors} descriptors"
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
        kinds = [self._kill, self._kill, self._stop, self._burst, self._hang_up]
        if self.server.hosts is not None:
            kinds += [self._cut, self._slow, self._lose, self._kill_node]
        left: list[Callable[[], Awaitable[None]]] = []
        while time.monotonic() < end:
            await asyncio.sleep(self.random.uniform(1, 6))
            left = left or self.random.sample(kinds, len(kinds))  # Each comes before any again.
            await left.pop()()

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
        self.server.processes[0].send_signal(signal.SIGHUP)
        self.troubles["hang-ups"] += 1

    async def _kill_node(self) -> None:
        """All workers of the other node at once, unless one of them has died too often."""
        workers = self.server.workers(self.server.processes[1])
        if workers and all(self._may_die(name) for name in workers):
            for name, worker in workers.items():
                self.deaths[name].append(time.monotonic())
                worker.kill()
            self.troubles["nodes' workers killed"] += 1

    async def _cut(self) -> None:
        """A wire that swallows everything, or that is pulled, so that both kernels know."""
        assert self.server.hosts is not None
        name = self.random.choice(("cut", "pulled"))
        with self.server.hosts.cut() if name == "cut" else self.server.hosts.unplug():
            await asyncio.sleep(self.random.uniform(0.1, LONGEST_CUT_S))
        self.troubles[f"wire {name}"] += 1

    async def _slow(self) -> None:
        await self._have_faulty_wire(SLOW)
        self.troubles["wire slow"] += 1

    async def _lose(self) -> None:
        await self._have_faulty_wire(LOSSY)
        self.troubles["wire lossy"] += 1

    async def _have_faulty_wire(self, wire: Wire) -> None:
        assert self.server.hosts is not None
        with self.server.hosts.faulty(wire):
            await asyncio.sleep(self.random.uniform(2, 6))

    def _victim(self) -> psutil.Process | None:
        workers = {n: w for n, w in self.server.workers().items() if self._may_die(n)}
        if not workers:
            return None
        name = self.random.choice(sorted(workers))
        self.deaths[name].append(time.monotonic())
        return workers[name]

    def _may_die(self, name: str) -> bool:
        deaths = self.deaths[name]
        return len(deaths) < MAX_DEATHS_A_MINUTE or time.monotonic() - deaths[0] > MINUTE_S


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


async def run(model: Path, seconds: float, seed: int, hosts: Hosts | None = None) -> Chaos:
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(serving(model, hosts))
        options = {"timeout_s": 120.0, "retry": Retry(max_attempts=1)}
        clients = [
            await stack.enter_async_context(AsyncClient(url, **options))
            for url in (server.http, server.grpc)
        ]
        chaos = Chaos(server, clients, random.Random(seed))
        await chaos.learn()
        await asyncio.gather(*(chaos._ask() for _ in range(BURST)))  # opens what will stay open
        await settled(server)
        before = await server.footprint()
        await chaos.run(seconds)
        await settled(server)
        chaos.footprints = (before, await server.footprint())
        chaos.check()
    return chaos


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    is_root = os.geteuid() == 0 and shutil.which("ip") is not None
    parser.add_argument("--hosts", type=int, choices=(1, 2), default=1 + is_root)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        hosts = stack.enter_context(two_hosts()) if arguments.hosts == 2 else None
        if hosts is not None and not hosts.has_netem():
            print("This kernel has no netem: a relay delays and loses packets instead.")
        model = save_tiny("llama", Path(folder), vocab_size=400)
        build_tokenizer().save_pretrained(model)
        chaos = asyncio.run(run(model, arguments.seconds, arguments.seed, hosts))
    print(f"{arguments.seconds:.0f} s, {arguments.hosts} hosts, seed {arguments.seed}: {chaos}")


if __name__ == "__main__":
    main()
