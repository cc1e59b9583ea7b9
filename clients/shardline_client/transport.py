"""The seam between a client and a door: everything above it is the same for both."""

from collections.abc import AsyncGenerator
from typing import Protocol

from shardline_client.requests import Generate, Tokenize
from shardline_client.results import BudgetOutcome, Model, Piece, Tokens, Usage
from shardline_client.settings import Settings

Generated = Piece | Usage | BudgetOutcome


class Transport(Protocol):
    """One door. Methods raise ClientError; `timeout_s` is what is left for the call."""

    def generate(
        self, request: Generate, timeout_s: float | None
    ) -> AsyncGenerator[Generated, None]:
        """Pieces as they come, usage and outcome. Closing the generator ends the request."""

    async def tokenize(self, request: Tokenize, timeout_s: float | None) -> Tokens:
        """Token ids of a text or a conversation."""

    async def models(self, timeout_s: float | None) -> tuple[Model, ...]:
        """The names that the server answers to."""

    async def abort(self, request_id: str, timeout_s: float | None) -> bool:
        """End a request that another client started; whether it was running."""

    async def aclose(self) -> None:
        """Close the connections."""


def open_transport(settings: Settings) -> Transport:
    """The door that the address names. Called inside the event loop that is going to use it."""
    if settings.is_grpc:
        from shardline_client.grpc_transport import GrpcTransport

        return GrpcTransport(settings)
    from shardline_client.http_transport import HttpTransport

    return HttpTransport(settings)
