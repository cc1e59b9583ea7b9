"""Keeps an engine process behind the front end: one that dies is replaced, if there is hope."""

import asyncio
import contextlib
import logging
import time
from collections import deque

from shardline_server.child import describe_exit
from shardline_server.engine_config import EngineConfig
from shardline_server.engine_launch import EngineProcess
from shardline_server.errors import ConfigError
from shardline_server.frontend import Frontend
from shardline_shards.wire import Wire

logger = logging.getLogger("shardline")

MAX_DEATHS = 3
DEATHS_WITHIN_S = 60.0
_LAST_WORDS_TAKE_S = 1.0


class Supervisor:
    """One engine at a time, each as a child of this process."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._engine = EngineProcess(config)
        self._deaths: deque[float] = deque(maxlen=MAX_DEATHS)

    async def wire(self) -> Wire:
        """To the engine, once that has begun. Raises ConfigError if it ends instead."""
        return await asyncio.to_thread(self._engine.wait_begun)

    async def watch(self, frontend: Frontend) -> str:
        """Replace engines that die, until it is hopeless; returns why.

        It is if the engine said itself that it cannot go on, if it had not been ready, if it
        leads other nodes (they have left with it), or if engines keep dying.
        """
        while True:
            status = await asyncio.to_thread(self._engine.wait)
            if status >= 0:  # a signal leaves no time for last words
                with contextlib.suppress(TimeoutError):
                    return await asyncio.wait_for(frontend.wait_failed(), _LAST_WORDS_TAKE_S)
            reason = f"the engine process {describe_exit(status)}"
            if self._is_hopeless(frontend):
                frontend.fail(reason)
                return reason
            logger.error("%s; starting another one", reason)
            frontend.lose(reason)
            self._engine = EngineProcess(self._config)
            try:
                frontend.reconnect(await self.wire())
            except ConfigError as error:
                frontend.fail(f"{reason}, and the next one did not start: {error}")

    @property
    def has_refused(self) -> bool:
        """Whether the engine has ended for what the operator can mend."""
        return self._engine.has_refused

    def stop(self) -> None:
        """Ask the engine to leave, and see that it does."""
        self._engine.stop()

    def _is_hopeless(self, frontend: Frontend) -> bool:
        now = time.monotonic()
        self._deaths.append(now)
        keeps_dying = len(self._deaths) == MAX_DEATHS and now - self._deaths[0] < DEATHS_WITHIN_S
        has_served = frontend.engine.ready is not None
        return keeps_dying or not has_served or self._config.nodes is not None
