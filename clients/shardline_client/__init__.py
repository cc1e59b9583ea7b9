"""Clients for Shardline's two doors, with the same methods over HTTP and over gRPC.

with Client("grpc://127.0.0.1:50051") as client:
    for piece in client.stream_complete("Once upon a time", max_tokens=64):
        print(piece.text, end="", flush=True)
"""

from shardline_client.async_client import AsyncClient
from shardline_client.client import Client, Stream
from shardline_client.errors import (
    AuthenticationFailed,
    BudgetImpossible,
    BudgetUnmet,
    ClientError,
    ConnectionFailed,
    DeadlineMissed,
    ErrorFacts,
    InvalidRequest,
    NotFound,
    Overloaded,
    RequestRefused,
    RequestTimeout,
    ServerError,
    StreamBroken,
)
from shardline_client.requests import LatencyBudget, Message
from shardline_client.results import (
    BudgetOutcome,
    Choice,
    Completion,
    Model,
    Piece,
    TokenLogprob,
    Tokens,
    Usage,
)
from shardline_client.settings import Retry, Tls
from shardline_client.stream import AsyncStream

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "AuthenticationFailed",
    "BudgetImpossible",
    "BudgetOutcome",
    "BudgetUnmet",
    "Choice",
    "Client",
    "ClientError",
    "Completion",
    "ConnectionFailed",
    "DeadlineMissed",
    "ErrorFacts",
    "InvalidRequest",
    "LatencyBudget",
    "Message",
    "Model",
    "NotFound",
    "Overloaded",
    "Piece",
    "RequestRefused",
    "RequestTimeout",
    "Retry",
    "ServerError",
    "Stream",
    "StreamBroken",
    "Tls",
    "TokenLogprob",
    "Tokens",
    "Usage",
]
