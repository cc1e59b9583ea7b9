"""What the scheduler is told once, at start."""

from dataclasses import dataclass

from .policy import POLICIES


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerConfig:
    """Limits of the scheduler; raises ValueError, with the numbers, where they cannot work.

    `num_blocks` blocks of `block_size` tokens are the KV memory that every worker has.
    `max_num_seqs` limits the running requests, `max_num_batched_tokens` the tokens of one step,
    `max_num_waiting` the queue. `max_in_flight` is the number of steps that may be planned and not
    yet committed; None means one for each of the `num_stages` stages. With `plans_ahead` there is
    one more, which waits in the first stage for that to be free: a request may then be in two, and
    its token of the first is read in the second without the scheduler knowing it.
    """

    num_blocks: int
    max_model_len: int
    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_num_waiting: int = 1024
    num_stages: int = 1
    max_in_flight: int | None = None
    enable_prefix_cache: bool = True
    plans_ahead: bool = False
    policy: str = "edf"

    def __post_init__(self) -> None:
        for name in (
            "num_blocks",
            "max_model_len",
            "block_size",
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_num_waiting",
            "num_stages",
            "in_flight_limit",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
        if self.max_num_batched_tokens < self.max_num_seqs:
            # Else decodes alone could fill every step, and a prompt would never get its turn.
            raise ValueError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} is below "
                f"max_num_seqs {self.max_num_seqs}; raise the first or lower the second"
            )
        if self.plans_ahead and self.max_in_flight is not None:
            raise ValueError(
                f"plans_ahead has {self.num_stages + 1} steps in flight, and max_in_flight is "
                f"{self.max_in_flight}; leave one of them out"
            )
        if self.policy not in POLICIES:
            raise ValueError(f"policy {self.policy!r} is unknown; one of {sorted(POLICIES)}")

    @property
    def in_flight_limit(self) -> int:
        """How many steps may be in flight."""
        if self.plans_ahead:
            return self.num_stages + 1
        return self.num_stages if self.max_in_flight is None else self.max_in_flight

    @property
    def num_shares(self) -> int:
        """Among how many steps the decodes are dealt; one that is planned ahead has those of the
        first again.
        """
        return self.num_stages if self.plans_ahead else self.in_flight_limit

    @property
    def num_trips_at_once(self) -> float:
        """How many steps of each decode are in flight, in the mean: ahead it is more than one, and
        while one is computed, another one is on its way there or back.
        """
        return self.in_flight_limit / self.num_shares

    @property
    def max_request_tokens(self) -> int:
        """Prompt and output tokens that one request may have: the context window or all memory.

        The last output token is never read back, so it needs no slot.
        """
        return min(self.max_model_len, self.num_blocks * self.block_size + 1)
