"""The front end put together: both doors, one service, one connection to the engine.

Start it, wait until it is ready, stop it. Signals and the engine's process are the launcher's.
"""

import asyncio
import logging
import socket
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn

from shardline_server.api_keys import ApiKeys, named_keys
from shardline_server.budgets import BudgetPolicy
from shardline_server.engine_client import EngineClient
from shardline_server.errors import ConfigError
from shardline_server.generation import GenerationService
from shardline_server.grpc_api.server import GrpcServer
from shardline_server.http_api.app import create_app
from shardline_server.messages import EngineReady
from shardline_server.metrics import Metrics
from shardline_server.served_model import load_model_files

logger = logging.getLogger("shardline.frontend")

_CLOSING_TAKES_S = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class FrontendConfig:
    """What a front end needs to know.

    Port 0 takes a free one. `model_path` is a folder with the tokenizer and the configs.
    `default_max_tokens` caps a chat answer when the client names no limit.
    """

    host: str
    http_port: int
    grpc_port: int
    engine_address: str
    model_path: Path
    served_model_names: tuple[str, ...]
    api_keys: tuple[str, ...] = ()
    default_max_tokens: int = 512
    budgets: BudgetPolicy = field(default_factory=BudgetPolicy)


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the doors really are."""

    host: str
    http_port: int
    grpc_port: int

    @property
    def http_url(self) -> str:
        """For an HTTP client on this host."""
        return f"http://{url_host(self.host)}:{self.http_port}"

    @property
    def grpc_target(self) -> str:
        """For a gRPC client on this host."""
        return f"{url_host(self.host)}:{self.grpc_port}"


class Frontend:
    """One front end in this process's event loop."""

    def __init__(self, config: FrontendConfig) -> None:
        self.config = config
        self.engine = EngineClient(config.engine_address)
        metrics = Metrics(config.served_model_names[0], self.engine)
        self.service = GenerationService(
            self.engine,
            metrics,
            default_max_tokens=config.default_max_tokens,
            budgets=config.budgets,
        )
        self._serving = asyncio.Event()

    async def start(self) -> Addresses:
        """Open both doors; they answer 503 until the engine is ready.

        Raises ConfigError if a port is taken or the model has no usable tokenizer.
        """
        config = self.config
        self._files = await asyncio.to_thread(load_model_files, config.model_path)
        keys = ApiKeys(named_keys(config.api_keys))
        self._http = HttpServer(self.service, keys)
        self._grpc = GrpcServer(self.service, keys)
        http_port = self._http.bind(config.host, config.http_port)
        try:
            grpc_port = self._grpc.bind(config.host, config.grpc_port)
        except ConfigError:
            self._http.close()
            raise
        await self.engine.start()
        await self._http.start()
        await self._grpc.start()
        self._follower = asyncio.create_task(self._follow_engine())
        return Addresses(config.host, http_port, grpc_port)

    async def wait_ready(self) -> None:
        """Until requests can be served; raises EngineUnavailable if the engine fails instead."""
        await self.engine.wait_ready()
        await self._serving.wait()

    async def wait_failed(self) -> str:
        """Until the engine has failed; returns the reason."""
        return await self.engine.wait_failed()

    def fail(self, reason: str) -> None:
        """The engine has died: every open stream ends with an error, and health says why."""
        self.engine.fail(reason)

    def lose(self, reason: str) -> None:
        """The engine has died and another one is coming: open streams end with an error."""
        self.engine.lose(reason)

    async def reconnect(self, engine_address: str) -> None:
        """To the engine that has come; requests are taken again when it is ready."""
        await self.engine.reconnect(engine_address)

    async def drain(self, grace_s: float) -> None:
        """Refuse what comes, and give what runs `grace_s`; the doors stay open to say so.

        What is predicted to take longer ends at once.
        """
        self._follower.cancel()
        self.service.refuse("the server is shutting down")
        await self._grpc.set_serving(False)
        self.engine.drain(grace_s)
        await self.service.wait_idle(grace_s)

    async def stop(self) -> None:
        """End what runs, let the readers have the last words, close the doors."""
        self._follower.cancel()
        self.service.refuse("the server is shutting down")
        closing = asyncio.gather(
            self._http.stop(_CLOSING_TAKES_S), self._grpc.stop(_CLOSING_TAKES_S)
        )
        await self.engine.stop()
        await closing

    async def _follow_engine(self) -> None:
        """Serve whenever the engine can, and with the limits of the one that is there now."""
        while self.engine.is_healthy:
            if self.engine.is_serving:
                self._attach(self.engine.require_ready())
            await self._grpc.set_serving(self.engine.is_serving)
            await self.engine.wait_changed()
        logger.error("No longer serving: %s", self.engine.failure)
        await self._grpc.set_serving(False)

    def _attach(self, ready: EngineReady) -> None:
        names = self.config.served_model_names
        self.service.attach(self._files.serve(names, ready, created=int(time.time())))
        self._serving.set()


class HttpServer:
    """uvicorn on a socket that is bound beforehand, without its signal handlers."""

    def __init__(self, service: GenerationService, keys: ApiKeys) -> None:
        app = create_app(service, keys)
        self._server = _Uvicorn(
            uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", ws="none")
        )

    def bind(self, host: str, port: int) -> int:
        """Take the port; returns the real one. Raises ConfigError."""
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            self._socket = socket.create_server((host, port), family=family)
        except OSError as error:
            raise port_error("HTTP", host, port, str(error.strerror)) from error
        return int(self._socket.getsockname()[1])

    async def start(self) -> None:
        """Returns when connections are accepted."""
        self._task = asyncio.create_task(self._server.serve([self._socket]))
        await self._server.has_started.wait()

    async def stop(self, grace_s: float) -> None:
        """Close idle connections, wait for the others: a little longer than `grace_s`."""
        self._server.config.timeout_graceful_shutdown = int(grace_s) + 2
        self._server.should_exit = True
        await self._task

    def close(self) -> None:
        """Give the port back without having started."""
        self._socket.close()


class _Uvicorn(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.has_started = asyncio.Event()

    def capture_signals(self) -> nullcontext[None]:  # type: ignore[override]
        return nullcontext()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.has_started.set()


def port_error(door: str, host: str, port: int, reason: str) -> ConfigError:
    """What the operator is told when a door cannot open."""
    return ConfigError(f"{door} cannot listen at {host}:{port} ({reason}); choose another port.")


def url_host(host: str) -> str:
    """An address as it stands in a URL; one that stands for every address becomes this host's."""
    local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{local}]" if ":" in local else local
