"""The sockets that the HTTP door answers on."""

import asyncio
import socket

from fastapi import FastAPI

from shardline_server.door_config import DoorLimits
from shardline_server.http_api.server import HttpServer


async def find_delay() -> int:
    """What TCP_NODELAY is on the server's side of a connection."""
    server = HttpServer(FastAPI(), DoorLimits(), None)
    port = server.bind("127.0.0.1", 0)
    await server.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
    assert b"404" in await reader.readline()
    (connection,) = server._server.server_state.connections
    accepted = connection.transport.get_extra_info("socket")
    no_delay: int = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    writer.close()
    await server.stop(0)
    return no_delay


def test_small_segments_do_not_wait_for_acknowledgements() -> None:
    assert asyncio.run(find_delay())
