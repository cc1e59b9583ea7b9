"""What load is wanted."""

import random
from dataclasses import dataclass, field
from pathlib import Path

from shardline_client.bench.classes import UNLIMITED, RequestClass

DEFAULT_NUM_REQUESTS = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchOptions:
    """Closed loop (`concurrency` at a time) or open loop (`rates` per second, or a trace).

    An open loop's gaps are gamma distributed with coefficient of variation `cv`; 1 is Poisson. A
    `trace` gives arrivals and lengths, from its beginning; a rate stretches what is used of it (its
    first `num_requests`, or all) to that mean, where `time_scale` says by how much. Other lengths
    are ranges, drawn evenly. A run ends after `num_requests`, or when `duration_s` is over and what
    was begun has ended, whichever comes first. Requests that arrive in the first `warm_up_s` or the
    last `cool_down_s` are sent and not counted.

    Each rate runs once for each of `num_seeds` seeds, `seed`, `seed` + 1, …; a seed that was used
    before sends prompts that a prefix cache may know; by default it is new. Raises ValueError where
    options exclude each other.
    """

    concurrency: int | None = None
    rates: tuple[float, ...] = ()
    cv: float = 1.0
    trace: Path | None = None
    time_scale: float | None = None
    length_scale: float = 1.0
    budgets: tuple[RequestClass, ...] = ()
    send_budget: bool | None = None
    num_requests: int | None = None
    duration_s: float | None = None
    warm_up_s: float = 0.0
    cool_down_s: float = 0.0
    prompt_tokens: tuple[int, int] = (256, 256)
    output_tokens: tuple[int, int] = (128, 128)
    seed: int = field(default_factory=lambda: random.getrandbits(32))
    num_seeds: int = 1
    find_capacity: bool = False
    precision: float = 0.1
    temperature: float = 0.0
    is_chat: bool = False
    ignore_eos: bool | None = None

    def __post_init__(self) -> None:
        for is_wrong, message in self._complaints():
            if is_wrong:
                raise ValueError(message)

    def _complaints(self) -> tuple[tuple[bool, str], ...]:
        names = [one.name for one in self.budgets]
        left_out_s = self.warm_up_s + self.cool_down_s
        return (
            (
                self.is_open_loop and self.concurrency is not None,
                "--concurrency excludes --rate and --trace: a closed loop has no arrivals of its "
                "own; give one of them.",
            ),
            (
                self.trace is not None and self.cv != 1.0,
                "--cv and --burstiness shape drawn arrivals; a --trace brings its own.",
            ),
            (
                self.trace is None and (self.time_scale is not None or self.length_scale != 1.0),
                "--time-scale and --length-scale need a --trace.",
            ),
            (
                self.time_scale is not None and bool(self.rates),
                "--rate and --time-scale both say how fast the trace runs; give one of them.",
            ),
            (
                left_out_s > 0 and not self.is_open_loop,
                "--warm-up and --cool-down need arrivals: give --rate or --trace.",
            ),
            (
                self.duration_s is not None and left_out_s >= self.duration_s,
                f"--warm-up and --cool-down ({left_out_s:g} s) leave nothing of --duration "
                f"{self.duration_s or 0:g}.",
            ),
            (
                len(set(names)) < len(names),
                f"--budget is given twice for one class: {', '.join(names)}.",
            ),
            (
                self.find_capacity and (len(self.rates) > 1 or self.concurrency is not None),
                "--find-capacity begins at one --rate and finds the others.",
            ),
            (
                self.find_capacity and not self.budgets,
                "--find-capacity needs a --budget to judge by.",
            ),
        )

    @property
    def is_open_loop(self) -> bool:
        """Whether requests arrive on their own."""
        return bool(self.rates) or self.trace is not None or self.find_capacity

    @property
    def num_workers(self) -> int:
        """Of a closed loop."""
        return self.concurrency or 1

    @property
    def classes(self) -> tuple[RequestClass, ...]:
        """What the load is mixed of."""
        return self.budgets or (UNLIMITED,)

    @property
    def seeds(self) -> range:
        """One run each."""
        return range(self.seed, self.seed + self.num_seeds)

    @property
    def max_requests(self) -> int | None:
        """None: only the time, or the trace's length, counts."""
        if self.num_requests is None and self.duration_s is None and self.trace is None:
            return DEFAULT_NUM_REQUESTS
        return self.num_requests
