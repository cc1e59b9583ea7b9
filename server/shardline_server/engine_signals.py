"""How the engine process is told to leave: by a signal that reaches nobody else.

SIGTERM would not do: whoever stops a server may send it to the whole group of processes, and the
engine is to go on until the front end, which got it too, has let requests finish.
"""

import signal
from collections.abc import Callable

LEAVE = signal.SIGUSR1


class Leaving(BaseException):
    """LEAVE has come: whatever the loop is doing does not matter any more."""


class StopSignal:
    """The first LEAVE raises Leaving wherever the engine is; every other one only hurries, since
    leaving must not be interrupted.
    """

    def __init__(self, hurry: Callable[[], None]) -> None:
        self._hurry = hurry
        self._is_leaving = False
        signal.signal(LEAVE, self._receive)

    def spend(self) -> None:
        """The engine ends by itself: from now on none raises."""
        self._is_leaving = True

    def _receive(self, *_: object) -> None:
        if self._is_leaving:
            self._hurry()
        else:
            self._is_leaving = True
            raise Leaving
