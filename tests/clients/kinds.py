"""Both kinds of client with one way to be asked, so that a test is written once."""

import asyncio
from collections.abc import Callable
from typing import Any, Protocol, Self

from shardline_client import AsyncClient, Client, Completion, Model, Piece, Tokens


class Asked(Protocol):
    """A client; `read_*` give all pieces of a stream."""

    def complete(self, prompt: Any, **options: Any) -> Completion: ...
    def chat(self, messages: Any, **options: Any) -> Completion: ...
    def tokenize(self, prompt: Any) -> Tokens: ...
    def models(self) -> tuple[Model, ...]: ...
    def abort(self, request_id: str) -> bool: ...
    def read_complete(self, prompt: Any, **options: Any) -> list[Piece]: ...
    def read_chat(self, messages: Any, **options: Any) -> list[Piece]: ...


class Blocking:
    def __init__(self, url: str, **options: Any) -> None:
        self._client = Client(url, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._client.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def read_complete(self, prompt: Any, **options: Any) -> list[Piece]:
        return list(self._client.stream_complete(prompt, **options))

    def read_chat(self, messages: Any, **options: Any) -> list[Piece]:
        return list(self._client.stream_chat(messages, **options))


class Asyncio:
    def __init__(self, url: str, **options: Any) -> None:
        self._runner = asyncio.Runner()
        self._client = AsyncClient(url, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._runner.run(self._client.aclose())
        self._runner.close()

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            return self._runner.run(getattr(self._client, name)(*arguments, **options))

        return call

    def read_complete(self, prompt: Any, **options: Any) -> list[Piece]:
        return self._runner.run(_all(self._client.stream_complete(prompt, **options)))

    def read_chat(self, messages: Any, **options: Any) -> list[Piece]:
        return self._runner.run(_all(self._client.stream_chat(messages, **options)))


async def _all(stream: Any) -> list[Piece]:
    return [piece async for piece in stream]


KINDS: dict[str, Callable[..., Any]] = {"blocking": Blocking, "asyncio": Asyncio}
