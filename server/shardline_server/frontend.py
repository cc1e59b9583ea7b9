"""The front end put together: both doors, one service, one connection to the engine.

Start it, wait until it is ready, stop it. Signals and the engine's process are the launcher's.
"""

import asyncio
import logging
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from shardline_server.api_keys import ApiKeys, read_keys
from shardline_server.budgets import BudgetPolicy
from shardline_server.door_config import DoorConfig
from shardline_server.engine_client import EngineClient
from shardline_server.errors import ConfigError
from shardline_server.generation import GenerationService
from shardline_server.grpc_api.server import GrpcServer
from shardline_server.http_api.app import create_admin_app, create_app
from shardline_server.http_api.server import HttpServer
from shardline_server.messages import EngineReady
from shardline_server.metrics import Metrics
from shardline_server.served_model import load_model_files
from shardline_shards.channel import Endpoint
from shardline_shards.wire import Wire

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
    engine: Endpoint | Wire
    model_path: Path
    served_model_names: tuple[str, ...]
    default_max_tokens: int = 512
    budgets: BudgetPolicy = field(default_factory=BudgetPolicy)
    door: DoorConfig = field(default_factory=DoorConfig)


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the doors really are."""

    host: str
    http_port: int
    grpc_port: int
    admin_port: int | None = None
    is_secure: bool = False

    @property
    def http_url(self) -> str:
        """For an HTTP client on this host."""
        return self._url(self.http_port)

    @property
    def admin_url(self) -> str:
        """Where metrics and documentation are."""
        return self._url(self.http_port if self.admin_port is None else self.admin_port)

    def _url(self, port: int) -> str:
        return f"http{'s' * self.is_secure}://{url_host(self.host)}:{port}"

    @property
    def grpc_target(self) -> str:
        """For a gRPC client on this host."""
        return f"{url_host(self.host)}:{self.grpc_port}"


class Frontend:
    """One front end in this process's event loop."""

    def __init__(self, config: FrontendConfig) -> None:
        self.config = config
        limits = config.door.limits
        self.engine = EngineClient(config.engine, max_unread_pieces=limits.max_unread_pieces)
        metrics = Metrics(config.served_model_names[0], self.engine)
        self.service = GenerationService(
            self.engine,
            metrics,
            default_max_tokens=config.default_max_tokens,
            budgets=config.budgets,
            limits=limits,
        )
        self._serving = asyncio.Event()

    async def start(self) -> Addresses:
        """Open both doors; they answer 503 until the engine is ready.

        Raises ConfigError if a port is taken or the model has no usable tokenizer.
        """
        config = self.config
        self._files = await asyncio.to_thread(load_model_files, config.model_path)
        addresses = self._bind()
        await self.engine.start()
        for http in self._http:
            await http.start()
        await self._grpc.start()
        self._follower = asyncio.create_task(self._follow_engine())
        return addresses

    def _bind(self) -> Addresses:
        """Make every server and take its port, or none."""
        host, door = self.config.host, self.config.door
        if door.tls is not None:
            door.tls.check()
        self._keys = ApiKeys(read_keys(door))
        public = create_app(self.service, self._keys, door)
        apps = {public: self.config.http_port}
        if door.admin_port is not None:
            apps[create_admin_app(self.service, public)] = door.admin_port
        self._http = [HttpServer(app, door.limits, door.tls) for app in apps]
        self._grpc = GrpcServer(self.service, self._keys, door)
        with ExitStack() as bound:
            ports: list[int | None] = []
            for http, port in zip(self._http, apps.values(), strict=True):
                ports.append(http.bind(host, port))
                bound.callback(http.close)
            grpc_port = self._grpc.bind(host, self.config.grpc_port)
            bound.pop_all()
        http_port, admin_port = [*ports, None][:2]
        assert http_port is not None
        return Addresses(host, http_port, grpc_port, admin_port, door.tls is not None)

    def reload_keys(self) -> None:
        """Read the file of API keys again; one that cannot be used changes nothing."""
        try:
            keys = read_keys(self.config.door)
        except ConfigError as error:
            logger.error("The API keys stay as they were: %s", error)
            return
        self._keys.replace(keys)
        logger.info("%d API keys are valid from now on", len(keys))

    async def wait_ready(self) -> None:
        """Until requests can be served; raises EngineUnavailable if the engine fails instead."""
        await self.engine.wait_ready()
        await self._serving.wait()

    async def wait_failed(self) -> str:
        """Until the engine has failed; returns the reason."""
        return await self.engine.wait_failed()

    async def wait_asked_to_leave(self) -> str:
        """Until another node was told to leave, and with it the server; returns which."""
        return await self.engine.wait_asked_to_leave()

    def fail(self, reason: str) -> None:
        """The engine has died: every open stream ends with an error, and health says why."""
        self.engine.fail(reason)

    def lose(self, reason: str) -> None:
        """The engine has died and another one is coming: open streams end with an error."""
        self.engine.lose(reason)

    def reconnect(self, engine: Endpoint | Wire) -> None:
        """To the engine that has come; requests are taken again when it is ready."""
        self.engine.reconnect(engine)

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
        doors: tuple[HttpServer | GrpcServer, ...] = (*self._http, self._grpc)
        closing = asyncio.gather(*(door.stop(_CLOSING_TAKES_S) for door in doors))
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


def url_host(host: str) -> str:
    """An address as it stands in a URL; one that stands for every address becomes this host's."""
    local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{local}]" if ":" in local else local
