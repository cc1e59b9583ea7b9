"""What SIGTERM does to the engine process."""

import signal
from collections.abc import Callable


class Leaving(BaseException):
    """SIGTERM has come: whatever the loop is doing does not matter any more."""


class StopSignal:
    """The first SIGTERM raises Leaving wherever the engine is; every other one only hurries, since
    leaving must not be interrupted.
    """

    def __init__(self, hurry: Callable[[], None]) -> None:
        self._hurry = hurry
        self._is_leaving = False
        signal.signal(signal.SIGTERM, self._receive)

    def spend(self) -> None:
        """The engine ends by itself: from now on none raises."""
        self._is_leaving = True

    def _receive(self, *_: object) -> None:
        if self._is_leaving:
            self._hurry()
        else:
            self._is_leaving = True
            raise Leaving
