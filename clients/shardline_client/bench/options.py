"""What load is wanted."""

import random
from dataclasses import dataclass, field

DEFAULT_NUM_REQUESTS = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchOptions:
    """Closed loop (`concurrency` at a time) or open loop (`rate` per second, Poisson).

    Lengths are ranges, drawn evenly. It ends after `num_requests`, or when `duration_s` is over and
    what was begun has ended, whichever comes first. A `seed` that was used before sends prompts
    that a prefix cache may know; by default it is new. Raises ValueError where options exclude each
    other.
    """

    concurrency: int | None = None
    rate: float | None = None
    num_requests: int | None = None
    duration_s: float | None = None
    prompt_tokens: tuple[int, int] = (256, 256)
    output_tokens: tuple[int, int] = (128, 128)
    seed: int = field(default_factory=lambda: random.getrandbits(32))
    temperature: float = 0.0
    is_chat: bool = False
    ignore_eos: bool | None = None

    def __post_init__(self) -> None:
        if self.rate is not None and self.concurrency is not None:
            raise ValueError("--rate and --concurrency exclude each other; give one of them.")

    @property
    def num_workers(self) -> int:
        """Of a closed loop."""
        return self.concurrency or 1

    @property
    def max_requests(self) -> int | None:
        """None: only the time counts."""
        if self.num_requests is None and self.duration_s is None:
            return DEFAULT_NUM_REQUESTS
        return self.num_requests
