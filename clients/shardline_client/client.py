"""The blocking client: the asynchronous one, run in a thread of its own."""

from collections.abc import AsyncIterator, Callable, Iterator
from functools import cached_property
from types import TracebackType
from typing import Self, Unpack

from shardline_client.async_client import AsyncClient
from shardline_client.loop_thread import LoopThread
from shardline_client.requests import ChatOptions, CompleteOptions, Messages, Prompt
from shardline_client.results import BudgetOutcome, Completion, Model, Piece, Tokens, Usage
from shardline_client.settings import ClientOptions, Settings
from shardline_client.stream import AsyncStream


class Stream:
    """An answer in pieces, for one `for`; the request is sent when that begins.

    Leaving the loop (break or an exception) ends the request on the server; `with` around it, or
    `close()`, waits until that is done.
    """

    def __init__(self, stream: AsyncStream, thread: LoopThread) -> None:
        self._stream = stream
        self._thread = thread

    @property
    def request_id(self) -> str:
        """The id to abort it by."""
        return self._stream.request_id

    @property
    def usage(self) -> Usage | None:
        """What the request took; None until the stream has ended by itself."""
        return self._stream.usage

    @property
    def latency_budget(self) -> BudgetOutcome | None:
        """How its latency budget was kept; None until the stream has ended by itself."""
        return self._stream.latency_budget

    @property
    def completion(self) -> Completion:
        """What has come so far, put together."""
        return self._stream.completion

    def collect(self) -> Completion:
        """Read to the end; the whole answer."""
        return self._thread.run(self._stream.collect())

    def abort(self) -> None:
        """End the request, from any thread; its reader gets a last piece with "abort"."""
        self._thread.run(_called(self._stream.abort))

    def close(self) -> None:
        """End the request if it runs; its reader gets nothing more."""
        self._thread.run(self._stream.aclose())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[Piece]:
        pieces = aiter(self._stream)
        try:
            while (piece := self._thread.run(_next(pieces))) is not None:
                yield piece
        except BaseException:
            self._thread.post(self._stream.aclose())
            raise


class Client:
    """One server, over the door that the address names: http://, https://, grpc://, grpcs://.

    Connections are opened by the first call, shared by all, and closed by `close()` or `with`. Any
    thread may call. Methods raise ClientError (see `errors`).
    """

    def __init__(self, url: str, **options: Unpack[ClientOptions]) -> None:
        self._client = AsyncClient(url, **options)
        self._is_closed = False

    @property
    def settings(self) -> Settings:
        """How it was made."""
        return self._client.settings

    def complete(self, prompt: Prompt, **options: Unpack[CompleteOptions]) -> Completion:
        """Continue a text, or token ids."""
        return self.stream_complete(prompt, **options).collect()

    def chat(self, messages: Messages, **options: Unpack[ChatOptions]) -> Completion:
        """Answer a conversation."""
        return self.stream_chat(messages, **options).collect()

    def stream_complete(self, prompt: Prompt, **options: Unpack[CompleteOptions]) -> Stream:
        """The same as `complete`, in pieces."""
        return Stream(self._client.stream_complete(prompt, **options), self._thread)

    def stream_chat(self, messages: Messages, **options: Unpack[ChatOptions]) -> Stream:
        """The same as `chat`, in pieces."""
        return Stream(self._client.stream_chat(messages, **options), self._thread)

    def tokenize(self, prompt: str | Messages, *, model: str | None = None) -> Tokens:
        """The token ids of a text, or of a conversation in the model's chat template."""
        return self._thread.run(self._client.tokenize(prompt, model=model))

    def models(self) -> tuple[Model, ...]:
        """The names that the server answers to, its first model first."""
        return self._thread.run(self._client.models())

    def abort(self, request_id: str) -> bool:
        """End a running request; its reader gets finish_reason "abort". False if none ran.

        Over gRPC also a request that another client started; over HTTP only one of this client's,
        since there a request is known by its connection alone.
        """
        return self._thread.run(self._client.abort(request_id))

    def close(self) -> None:
        """End what runs, and close the connections."""
        self._is_closed = True
        if "_loop_thread" in vars(self):
            self._loop_thread.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @cached_property
    def _loop_thread(self) -> LoopThread:
        return LoopThread(self._client.aclose)

    @property
    def _thread(self) -> LoopThread:
        if self._is_closed:
            raise RuntimeError("This client is closed.")
        return self._loop_thread


async def _next(pieces: AsyncIterator[Piece]) -> Piece | None:
    return await anext(pieces, None)


async def _called(function: Callable[[], None]) -> None:
    function()
