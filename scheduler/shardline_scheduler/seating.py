"""Who waits, who runs, and the KV memory that those who run hold."""

from itertools import count

from .config import SchedulerConfig
from .memory import KvMemory
from .policy import Policy
from .queue import WaitingQueue
from .request import Request, RequestState
from .running import RunningRequests


class Seating:
    """Every live request waits or runs, and holds blocks exactly while it runs."""

    def __init__(self, config: SchedulerConfig, policy: Policy) -> None:
        self.memory = KvMemory(config.num_blocks, config.block_size, config.enable_prefix_cache)
        self.waiting = WaitingQueue(policy)
        self.running = RunningRequests(plans_ahead=config.plans_ahead)
        self.num_preemptions = 0
        self._released: list[int] = []
        self._indexes = count()

    def seat_first(self, prefix: list[int]) -> None:
        """The first of the queue runs, from behind the blocks that hold its beginning."""
        request = self.waiting.pop()
        request.start(next(self._indexes), self.memory.admit(request, prefix))
        self.running.add(request)

    def begin_promise(self, request: Request) -> None:
        """A guest is promised something from now on."""
        if request.state is RequestState.RUNNING:
            self.running.begin_promise(request)
        else:
            self.waiting.move(request)

    def release(self, request: Request) -> None:
        """Take a running request off the workers and out of memory."""
        self.running.remove(request)
        self._released.append(request.request_index)
        self.memory.free(request)

    def take_released(self) -> list[int]:
        """The indexes that workers may forget; each is told once."""
        released, self._released = self._released, []
        return released

    def restart(self, request: Request, num_cached_tokens: int) -> None:
        """A running request has to wait again; so many of its tokens may come from the cache."""
        self.release(request)
        request.restart()
        request.terms.num_cached_tokens = num_cached_tokens
        self.waiting.push(request)

    def preempt(self, request: Request) -> None:
        """The same, for the sake of another."""
        self.restart(request, request.num_computed_tokens)
        self.num_preemptions += 1
