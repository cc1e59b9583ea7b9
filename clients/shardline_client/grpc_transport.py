"""The gRPC door: grpc.aio and our own stubs."""

from collections.abc import AsyncGenerator, Awaitable
from pathlib import Path
from typing import TypeVar

import grpc

from shardline_client import grpc_wire
from shardline_client.errors import ConnectionFailed
from shardline_client.protos.shardline.v1 import generation_pb2 as pb
from shardline_client.protos.shardline.v1.generation_pb2_grpc import GenerationStub
from shardline_client.requests import Generate, Tokenize
from shardline_client.results import Model, Tokens
from shardline_client.settings import Settings, Tls
from shardline_client.transport import Generated

T = TypeVar("T")
_MAX_MESSAGE_BYTES = 64 * 1024 * 1024  # long prompts with logprobs pass grpc's 4 MiB
_RECONNECT_MS = 100


class GrpcTransport:
    """One channel, over which all calls share one connection."""

    def __init__(self, settings: Settings) -> None:
        key = settings.api_key
        self._metadata = () if key is None else (("authorization", f"Bearer {key}"),)
        options = [
            ("grpc.enable_retries", 0),  # ours know about the first token
            ("grpc.initial_reconnect_backoff_ms", _RECONNECT_MS),
            ("grpc.max_reconnect_backoff_ms", round(settings.retry.max_wait_s * 1000)),
            # Also how long one attempt to connect may take.
            ("grpc.min_reconnect_backoff_ms", round(settings.connect_timeout_s * 1000)),
            ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
        ]
        target = settings.grpc_target
        if settings.is_secure:
            credentials = _credentials(settings.tls or Tls())
            self._channel = grpc.aio.secure_channel(target, credentials, options)
        else:
            self._channel = grpc.aio.insecure_channel(target, options)
        self._stub = GenerationStub(self._channel)

    async def generate(
        self, request: Generate, timeout_s: float | None
    ) -> AsyncGenerator[Generated, None]:
        """GenerateStream; leaving it cancels the call."""
        call = self._stub.GenerateStream(
            grpc_wire.generate_request(request), timeout=timeout_s, metadata=self._metadata
        )
        is_complete = False
        try:
            async for delta in call:
                is_complete = delta.HasField("usage")
                for part in grpc_wire.parts(delta):
                    yield part
        except grpc.aio.AioRpcError as error:
            raise grpc_wire.error_of(error) from error
        finally:
            call.cancel()
        if not is_complete:
            raise ConnectionFailed("The stream ended before it was complete.")

    async def tokenize(self, request: Tokenize, timeout_s: float | None) -> Tokens:
        """Tokenize."""
        message = grpc_wire.tokenize_request(request)
        call = self._stub.Tokenize(message, timeout=timeout_s, metadata=self._metadata)
        return grpc_wire.tokens(await _answer(call))

    async def models(self, timeout_s: float | None) -> tuple[Model, ...]:
        """ListModels."""
        message = pb.ListModelsRequest()
        call = self._stub.ListModels(message, timeout=timeout_s, metadata=self._metadata)
        return grpc_wire.models(await _answer(call))

    async def abort(self, request_id: str, timeout_s: float | None) -> bool:
        """Abort, by an id that may be another client's."""
        message = pb.AbortRequest(request_id=request_id)
        call = self._stub.Abort(message, timeout=timeout_s, metadata=self._metadata)
        return (await _answer(call)).was_running

    async def aclose(self) -> None:
        """Close the channel; calls that still run are cancelled."""
        await self._channel.close(None)


async def _answer(call: Awaitable[T]) -> T:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise grpc_wire.error_of(error) from error


def _credentials(tls: Tls) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(
        root_certificates=_read(tls.ca_file),
        private_key=_read(tls.key_file),
        certificate_chain=_read(tls.cert_file),
    )


def _read(path: Path | str | None) -> bytes | None:
    return None if path is None else Path(path).read_bytes()
