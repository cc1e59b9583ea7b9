"""The gRPC server: our service, the standard health and reflection services, on one port."""

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from shardline_server.api_keys import ApiKeys
from shardline_server.door_config import DoorConfig, DoorLimits, TlsFiles
from shardline_server.errors import ConfigError
from shardline_server.generation import GenerationService
from shardline_server.grpc_api.guard import Guard
from shardline_server.grpc_api.service import GenerationRpc
from shardline_server.protos.shardline.v1 import generation_pb2
from shardline_server.protos.shardline.v1.generation_pb2_grpc import (
    add_GenerationServicer_to_server,
)

SERVICE_NAME = generation_pb2.DESCRIPTOR.services_by_name["Generation"].full_name


class GrpcServer:
    """Made, bound and started inside a running event loop; NOT_SERVING until told otherwise."""

    def __init__(self, service: GenerationService, keys: ApiKeys, door: DoorConfig) -> None:
        self._tls = door.tls
        guard = Guard(SERVICE_NAME, keys, write_timeout_s=door.limits.write_timeout_s)
        self._server = grpc.aio.server(interceptors=[guard], options=_options(door.limits))
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        add_GenerationServicer_to_server(GenerationRpc(service, keys), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    def bind(self, host: str, port: int) -> int:
        """Take the port; returns the real one. Raises ConfigError."""
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if self._tls is None:
                return self._server.add_insecure_port(address)
            return self._server.add_secure_port(address, _credentials(self._tls))
        except RuntimeError as error:
            raise ConfigError(
                f"gRPC cannot listen at {address}: the port is in use or not allowed; "
                "choose another port."
            ) from error

    async def start(self) -> None:
        """Accept calls."""
        await self.set_serving(False)
        await self._server.start()

    async def set_serving(self, is_serving: bool) -> None:
        """What the health service says of the server and of our service."""
        statuses = health_pb2.HealthCheckResponse
        status = statuses.SERVING if is_serving else statuses.NOT_SERVING
        for name in ("", SERVICE_NAME):
            await self._health.set(name, status)

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls; those that run have `grace_s`, then they are cancelled."""
        await self._server.stop(grace_s)


def _options(limits: DoorLimits) -> list[tuple[str, int]]:
    read_ms, write_ms = round(limits.read_timeout_s * 1000), round(limits.write_timeout_s * 1000)
    return [
        # Without this option a second server on the same port would quietly share it.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", limits.max_body_bytes),
        ("grpc.max_metadata_size", limits.max_header_bytes),
        ("grpc.absolute_max_metadata_size", limits.max_header_bytes),
        ("grpc.server_handshake_timeout_ms", read_ms),
        # A client that is gone without a word answers no ping.
        ("grpc.keepalive_time_ms", write_ms),
        ("grpc.keepalive_timeout_ms", write_ms),
    ]


def _credentials(tls: TlsFiles) -> grpc.ServerCredentials:
    return grpc.ssl_server_credentials(
        [(tls.key.read_bytes(), tls.cert.read_bytes())],
        root_certificates=None if tls.client_ca is None else tls.client_ca.read_bytes(),
        require_client_auth=tls.client_ca is not None,
    )
