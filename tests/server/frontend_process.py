"""A front end alone in a process, so that its memory is its own.

Takes a `Start` as JSON on standard input, says its addresses as JSON, and ends with its parent.
"""

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, Popen

import msgspec

from shardline_server.door_config import DoorConfig, DoorLimits
from shardline_server.frontend import Addresses, Frontend, FrontendConfig
from shardline_shards.channel import Endpoint


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """What it needs to know."""

    engine: Endpoint
    model_path: str
    limits: DoorLimits


@contextmanager
def frontend_process(
    engine: Endpoint, model: Path, limits: DoorLimits
) -> Iterator[tuple[int, Addresses]]:
    """Its process id, and where it is, once it serves."""
    start = Start(engine=engine, model_path=str(model), limits=limits)
    with Popen([sys.executable, "-m", __name__], stdin=PIPE, stdout=PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(msgspec.json.encode(start) + b"\n")
            process.stdin.flush()
            yield process.pid, msgspec.json.decode(process.stdout.readline(), type=Addresses)
        finally:
            process.kill()


async def _serve(start: Start) -> None:
    frontend = Frontend(
        FrontendConfig(
            host="127.0.0.1",
            http_port=0,
            grpc_port=0,
            engine=start.engine,
            model_path=Path(start.model_path),
            served_model_names=("tiny",),
            door=DoorConfig(limits=start.limits),
        )
    )
    addresses = await frontend.start()
    await frontend.wait_ready()
    print(msgspec.json.encode(addresses).decode(), flush=True)
    await asyncio.to_thread(sys.stdin.read)  # ends with the parent
    await frontend.stop()


if __name__ == "__main__":
    asyncio.run(_serve(msgspec.json.decode(sys.stdin.readline(), type=Start)))
