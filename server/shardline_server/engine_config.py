"""What the engine process is told when it starts."""

from msgspec import Struct

from shardline_scheduler import SchedulerConfig
from shardline_shards.gate import LaunchKeys
from shardline_shards.layout import ParallelLayout
from shardline_shards.partition import LayerTimes


class BoardAddress(Struct, frozen=True, kw_only=True):
    """Where the nodes of a launch leave notes for each other.

    The head keeps this board, unless it `is_kept_by_launcher`, in a store that others may use too:
    names of notes have a `prefix` there.
    """

    host: str
    port: int
    prefix: str = "shardline"
    is_kept_by_launcher: bool = False

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class NodesConfig(Struct, frozen=True, kw_only=True):
    """A launch over several nodes, by hand or by a `launcher`.

    `model` is what the operator typed: each node resolves it. `agreed` are the settings, by name,
    in which nodes that a launcher has started must not differ. `num_places` are the workers that
    each node may run (None: as many as it has GPUs, on CPUs any number).
    """

    num_nodes: int
    board: BoardAddress
    secret: str
    model: str
    agreed: dict[str, str]
    join_timeout_s: int
    launcher: str | None
    num_places: tuple[int, ...] | None
    may_cross_nodes: bool


class EngineConfig(Struct, frozen=True, kw_only=True):
    """Sent as JSON on the engine's standard input.

    `host` is the address that the engine and this node's workers bind to. The layers of `layout`
    may still move between stages, by what nodes can hold, unless it `has_fixed_stages`. None for
    `kv_memory_bytes` (per worker) and `num_kv_blocks` means: as much as is free; for
    `threads_per_worker`: the node's cores, dealt out; for `layer_times`: nothing is known
    of what layers take. For `measure_s` seconds step times are measured before the first request,
    and kept in `cache_dir`. `keys` open every channel between the processes of this launch, but for
    the wire whose end the engine inherits as descriptor `frontend_wire` from the front end that
    has started it.
    """

    parent_pid: int
    keys: LaunchKeys
    host: str
    model_path: str
    load_format: str
    layout: ParallelLayout
    has_fixed_stages: bool
    dtype: str
    device: str
    seed: int
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_waiting: int
    max_in_flight: int | None
    block_size: int
    kv_memory_bytes: int | None
    num_kv_blocks: int | None
    enable_prefix_caching: bool
    threads_per_worker: int | None
    log_level: str
    policy: str
    measure_s: float
    cache_dir: str
    nodes: NodesConfig | None = None
    layer_times: LayerTimes | None = None
    keeps_spare: bool = True
    has_cuda_graphs: bool = True
    plans_ahead: bool = False
    frontend_wire: int | None = None

    @property
    def max_kv_blocks(self) -> int:
        """As many as are asked for, else twice what the most and longest requests can fill; more
        would only slow the start.
        """
        if self.num_kv_blocks is not None:
            return self.num_kv_blocks
        return 2 * self.max_num_seqs * -(-self.max_model_len // self.block_size)

    def scheduler_config(self, num_blocks: int) -> SchedulerConfig:
        """What the scheduler is told, with so many blocks of KV memory."""
        return SchedulerConfig(
            num_blocks=num_blocks,
            max_model_len=self.max_model_len,
            block_size=self.block_size,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_num_waiting=self.max_num_waiting,
            num_stages=self.layout.pp,
            max_in_flight=self.max_in_flight,
            enable_prefix_cache=self.enable_prefix_caching,
            plans_ahead=self.plans_ahead,
            policy=self.policy,
        )


class EngineAddress(Struct, frozen=True):
    """The engine's one line on standard output: where front ends reach it."""

    address: str
