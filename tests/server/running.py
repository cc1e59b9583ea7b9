"""A front end that runs in a thread of this process, on real sockets."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardline_server.frontend import Addresses, Frontend, FrontendConfig
from shardline_shards.channel import Endpoint
from shardline_shards.wire import Wire


@dataclass
class RunningFrontend:
    frontend: Frontend
    addresses: Addresses
    loop: asyncio.AbstractEventLoop

    def call(self, coroutine: Any) -> Any:
        """The result of a coroutine that runs in the front end's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)


@contextmanager
def running_frontend(
    engine: Endpoint | Wire, model: Path, *, wait_ready: bool = True, **values: object
) -> Iterator[RunningFrontend]:
    defaults: dict[str, object] = {
        "host": "127.0.0.1",
        "http_port": 0,
        "grpc_port": 0,
        "engine": engine,
        "model_path": model,
        "served_model_names": ("tiny", "tiny-alias"),
    }
    config = FrontendConfig(**(defaults | values))  # type: ignore[arg-type]
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        frontend = asyncio.run_coroutine_threadsafe(_make(config), loop).result(60)
        addresses = asyncio.run_coroutine_threadsafe(frontend.start(), loop).result(60)
        running = RunningFrontend(frontend, addresses, loop)
        try:
            if wait_ready:
                running.call(frontend.wait_ready())
            yield running
        finally:
            running.call(frontend.stop())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _make(config: FrontendConfig) -> Frontend:
    return Frontend(config)
