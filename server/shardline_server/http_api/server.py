"""uvicorn on a socket that is bound beforehand, without its signal handlers."""

import asyncio
import socket
import ssl
from contextlib import nullcontext

import uvicorn
from fastapi import FastAPI

from shardline_server.door_config import DoorLimits, TlsFiles
from shardline_server.errors import ConfigError
from shardline_server.http_api.protocol import guarded_protocol


class HttpServer:
    """One application on one port."""

    def __init__(self, app: FastAPI, limits: DoorLimits, tls: TlsFiles | None) -> None:
        self._limits = limits
        config = uvicorn.Config(
            app,
            http=guarded_protocol(limits),
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
        )
        if tls is not None:
            config.ssl_certfile, config.ssl_keyfile = tls.cert, tls.key
            if tls.client_ca is not None:
                config.ssl_ca_certs, config.ssl_cert_reqs = str(tls.client_ca), ssl.CERT_REQUIRED
        self._server = _Uvicorn(config)

    def bind(self, host: str, port: int) -> int:
        """Take the port; returns the real one. Raises ConfigError."""
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            self._socket = socket.create_server((host, port), family=family)
        except OSError as error:
            raise port_error("HTTP", host, port, str(error.strerror)) from error
        # What is accepted inherits this; asyncio sets it for sockets that it has made itself. A
        # response's head and body are two segments, and without it the second one waits for the
        # client to acknowledge the first, which Linux puts off by 40 ms.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Linux closes a connection whose other end, for so long, acknowledges nothing or has no
        # room for more: a client that is gone without a word, or that does not read.
        self._socket.setsockopt(
            socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(self._limits.write_timeout_s * 1000)
        )
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
