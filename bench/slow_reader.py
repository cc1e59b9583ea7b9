"""What 31 readers notice of one that stops reading.

    PYTHONPATH=. python bench/slow_reader.py --rounds 3

Serves a tiny random model in two stages, so fast that what the kernel and `--max-unread` hold for
one connection is full after seconds. On each door in turn 32 streams run. In every other round the
32nd is not read any more after its first piece; in the others it is read like the rest. Its pieces
are fat (20 logprobs a token), and its HTTP connection has segments as on an Ethernet: loopback's
would let the kernel hold megabytes. Of the 31: tokens per second, and the time between two pieces.
Of the server: for how long the 32nd ran, and the front end's memory. The status is 1 if one of the
31 lost a token, or a stalled one was not ended alone.
"""

import argparse
import asyncio
import json
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles

import grpc
import httpx
import psutil
from machine import machine_facts
from servers import leave_on_sigterm
from serving import serving
from soak import find_server, free_port
from tables import markdown
from tests.server.conftest import build_tokenizer
from tests.tiny import save_tiny

from shardline_client import AsyncClient
from shardline_server.protos.shardline.v1 import generation_pb2 as pb
from shardline_server.protos.shardline.v1.generation_pb2_grpc import GenerationStub

NUM_READERS = 31
LOOK_INTERVAL_S = 0.1
MIB = 2**20


@dataclass
class Round:
    """What came of one round; `ran_s` is how long the server had the 32nd request."""

    door: str
    is_stalled: bool
    tokens_per_s: float = 0.0
    itl_ms: list[float] = field(default_factory=list)
    ran_s: float = 0.0
    rss: list[int] = field(default_factory=list)
    end: str = ""

    def row(self) -> list[str]:
        cuts = quantiles(self.itl_ms, n=100)
        return [
            self.door,
            "stalls" if self.is_stalled else "reads",
            f"{self.tokens_per_s:.0f}",
            *(f"{cut:.1f}" for cut in (cuts[49], cuts[98])),
            f"{self.ran_s:.1f}",
            self.end,
            f"{self.rss[0] / MIB:.1f} → {max(self.rss) / MIB:.1f}",
        ]


class Last:
    """The 32nd reader, in a thread of its own; stalled, it reads on only after `let_go`."""

    def __init__(self, read: Callable[[], Iterator[None]], is_stalled: bool) -> None:
        self._read = read
        self._let_go = threading.Event()
        if not is_stalled:
            self._let_go.set()
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._begun.wait()

    def let_go(self) -> None:
        """Read whatever there is; returns when there is no more."""
        self._let_go.set()
        self._thread.join()

    def _run(self) -> None:
        for _ in self._read():
            self._begun.set()
            self._let_go.wait()


def http_pieces(url: str, num_tokens: int, end: list[str]) -> Iterator[None]:
    """Yields after each read; `end` gets the last record."""
    body = {"prompt": "The", "stream": True, "logprobs": 20, "ignore_eos": True}
    content = json.dumps(body | {"max_tokens": num_tokens}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
    head += "Content-Type: application/json\r\nConnection: close\r\n\r\n"
    host, _, port = url.removeprefix("http://").rpartition(":")
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1448)
        connection.connect((host, int(port)))
        connection.sendall(head.encode() + content)
        received = b""
        while piece := connection.recv(65536):
            received = (received + piece)[-65536:]
            yield
    records = [line for line in received.split(b"\n") if line.startswith(b"data: ")]
    last = records[-1].removeprefix(b"data: ")
    end.append("done" if last == b"[DONE]" else json.loads(last)["error"]["code"])


def grpc_pieces(target: str, num_tokens: int, end: list[str]) -> Iterator[None]:
    """The same, of the other door; its window stays as it is at first."""
    with grpc.insecure_channel(target, [("grpc.http2.bdp_probe", 0)]) as channel:
        sampling = pb.SamplingParams(max_tokens=num_tokens, logprobs=20, ignore_eos=True)
        request = pb.GenerateRequest(text="The", sampling=sampling)
        try:
            for _ in GenerationStub(channel).GenerateStream(request):
                yield
            end.append("done")
        except grpc.RpcError as error:
            end.append(dict(error.trailing_metadata())["shardline-error-code"])


async def read_all(url: str, num_tokens: int) -> list[list[float]]:
    """When each piece of each of the 31 came. All of them get all their tokens."""

    async def read(client: AsyncClient, seed: int) -> list[float]:
        options = {"max_tokens": num_tokens, "ignore_eos": True, "seed": seed}
        times = []
        async with client.stream_complete("The", timeout_s=None, **options) as stream:
            async for piece in stream:
                if piece.text or piece.token_ids:
                    times.append(time.perf_counter())
            usage = stream.completion.usage
        if usage is None or usage.completion_tokens != num_tokens:
            sys.exit(f"a reader got {usage} instead of {num_tokens} tokens")
        return times

    async with AsyncClient(url) as client:
        return await asyncio.gather(*(read(client, seed) for seed in range(NUM_READERS)))


class Watch:
    """Looks at the server until it is closed: who runs, and the front end's memory."""

    def __init__(self, url: str, frontend: psutil.Process, found: Round) -> None:
        self._url, self._frontend, self._found = url, frontend, found
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        start = time.perf_counter()
        with httpx.Client(base_url=self._url) as probe:
            while not self._is_over.wait(LOOK_INTERVAL_S):
                self._found.rss.append(self._frontend.memory_info().rss)
                if probe.get("/load").json()["server_load"] > NUM_READERS:
                    self._found.ran_s = time.perf_counter() - start


def run_round(urls: dict[str, str], door: str, is_stalled: bool, num_tokens: int) -> Round:
    found, end = Round(door, is_stalled), list[str]()
    pieces = http_pieces if door == "http" else grpc_pieces
    target = urls[door].removeprefix("grpc://")
    watch = Watch(urls["http"], find_server(urls["http"]), found)
    last = Last(lambda: pieces(target, num_tokens, end), is_stalled)
    times = asyncio.run(read_all(urls[door], num_tokens))
    watch.close()
    last.let_go()
    gaps = [b - a for one in times for a, b in pairwise(one)]
    found.itl_ms = [gap * 1000 for gap in gaps]
    span_s = max(one[-1] for one in times) - min(one[0] for one in times)
    found.tokens_per_s = NUM_READERS * num_tokens / span_s
    found.end = end[0]
    return found


def compare(rounds: list[Round], door: str) -> str:
    """Of the 31, with one that stalls to with one that reads."""
    by_kind = {
        is_stalled: [one for one in rounds if (one.door, one.is_stalled) == (door, is_stalled)]
        for is_stalled in (False, True)
    }
    speeds = {k: median(one.tokens_per_s for one in v) for k, v in by_kind.items()}
    tails = {k: median(quantiles(one.itl_ms, n=100)[98] for one in v) for k, v in by_kind.items()}
    return (
        f"{door}: with one that stalls the others have {speeds[True] / speeds[False]:.3f} of the "
        f"tokens per second, and {tails[True] / tails[False]:.3f} of the p99 of ITL"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="of each kind, on each door")
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--max-unread", type=int, default=200)
    arguments = parser.parse_args()
    leave_on_sigterm()
    grpc_port = free_port()
    options = ["--grpc-port", str(grpc_port), "--max-unread-pieces", str(arguments.max_unread)]
    options += ["--num-kv-blocks", str(40 * (arguments.tokens // 16 + 2)), "--dtype", "float32"]
    facts = "; ".join(f"{name}: {value}" for name, value in machine_facts().items())
    with tempfile.TemporaryDirectory() as folder:
        size = {"vocab_size": 400, "max_position_embeddings": 2 * arguments.tokens}
        model = save_tiny("llama", Path(folder), **size)
        build_tokenizer().save_pretrained(model)
        with serving(str(model), "1x2", options) as (url, _):
            urls = {"http": url, "grpc": f"grpc://127.0.0.1:{grpc_port}"}
            for door in urls:  # caches fill, and clients' code is imported
                run_round(urls, door, False, arguments.tokens // 4)
            rounds = [
                run_round(urls, door, is_stalled, arguments.tokens)
                for door in urls
                for _ in range(arguments.rounds)
                for is_stalled in (False, True)
            ]
    print(facts)
    columns = ["door", "the 32nd", "tokens/s of 31", "ITL p50 ms", "p99", "32nd ran s", "its end"]
    print(markdown([*columns, "front end MiB"], [one.row() for one in rounds]))
    print("\n".join(compare(rounds, door) for door in urls))
    if any((one.end == "done") == one.is_stalled for one in rounds):
        sys.exit("not every stalled reader was ended, or one that read was")


if __name__ == "__main__":
    main()
