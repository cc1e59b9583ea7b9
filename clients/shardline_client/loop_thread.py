"""An event loop in a thread of its own, for callers that block."""

import asyncio
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")

_SIGNALS_WAIT_S = 0.2


class LoopThread:
    """Started when made, stopped by `stop` or at the program's end, whichever comes first.

    `close` is what the loop does last.
    """

    def __init__(self, close: Callable[[], Awaitable[None]]) -> None:
        started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        thread = threading.Thread(
            target=lambda: asyncio.run(_live(started, close)), name="shardline-client", daemon=True
        )
        thread.start()
        self._loop, stopping = started.result()
        self._stop = weakref.finalize(self, _stop, self._loop, stopping, thread)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Its result. If the caller is interrupted, it is cancelled, and its end waited for."""
        task: Future[asyncio.Task[T]] = Future()
        done: Future[None] = Future()
        self._loop.call_soon_threadsafe(_start, coroutine, task, done)
        try:
            _wait(done)
        except BaseException:
            self._loop.call_soon_threadsafe(task.result().cancel)
            done.result()
            raise
        return task.result().result()

    def post(self, coroutine: Coroutine[Any, Any, object]) -> None:
        """Begin it and wait for nothing; may be called from anywhere, also while collecting."""
        try:
            asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError:  # stopped, and with it everything that ran
            coroutine.close()

    def stop(self) -> None:
        """End what runs, and the thread."""
        self._stop()


async def _live(
    started: "Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]]",
    close: Callable[[], Awaitable[None]],
) -> None:
    stopping = asyncio.Event()
    started.set_result((asyncio.get_running_loop(), stopping))
    await stopping.wait()
    await close()


def _wait(done: "Future[None]") -> None:
    """A signal that comes just before a wait without end is seen when that ends, which may be
    never: so a Ctrl-C got lost.
    """
    while not done.done():
        with suppress(TimeoutError):
            done.result(_SIGNALS_WAIT_S)


def _start(
    coroutine: Coroutine[Any, Any, T], started: "Future[asyncio.Task[T]]", done: "Future[None]"
) -> None:
    task = asyncio.get_running_loop().create_task(coroutine)
    task.add_done_callback(lambda _: done.set_result(None))
    started.set_result(task)


def _stop(
    loop: asyncio.AbstractEventLoop, stopping: asyncio.Event, thread: threading.Thread
) -> None:
    loop.call_soon_threadsafe(stopping.set)
    if thread is not threading.current_thread():  # as it is when collected in there
        thread.join()
